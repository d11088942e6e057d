"""Cached clip vectors for stage `dialogue`."""

from ...data_prep.views import DialogueSamples
from ..samples import SampleStream, SourceSamples
from .outputs import FrozenOutputs


def compute_clips(trainer, stream: SampleStream) -> None:
    """
    Compute the vectors of the clips of a stream's reply samples, unless already done, and keep them in the stream.

    The memory is still encoded at each step, because samples that rebuild a conversation draw a new run of its
    utterances each time.

    Args:
        trainer: a `StageTrainer` with `cache_frozen_gib`, whose encoders and Q-formers are frozen.
        stream: the training or evaluation samples of the trainer.
    """
    collator, args = trainer.data_collator, trainer.args
    sizes = None if collator.cache is None else collator.cache.sizes
    for source, (_, rows, _) in enumerate(stream.sources):
        if isinstance(rows, DialogueSamples) and source not in stream.frozen:
            frozen = FrozenOutputs(
                trainer.processing_class, collator.prompt, args.cache_frozen_gib, sizes, keep_memory=False
            )
            size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
            samples = SourceSamples(stream, source)
            stream.frozen[source] = frozen.compute(trainer.model_wrapped, samples, trainer.accelerator, size, workers)
