"""Stage `dialogue` with the vectors of its clips computed once."""

import weakref

from transformers import TrainerCallback

from empathic.data_prep.views import DialogueSamples
from empathic.trainers.frozen_outputs import FrozenOutputs
from empathic.trainers.samples import SampleStream, SourceSamples


class FrozenClips:
    """
    Mixin over `Trainer` for `SampleStream` and `StageCollator`: with `cache_frozen_gib`, what the frozen encoders and
    Q-formers make of each clip is computed before training and kept. The memory is encoded as ever: the samples that
    rebuild a conversation draw another run of its utterances each time.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.cache_frozen_gib > 0:
            self.add_callback(_BeforeTraining(self))

    def compute_frozen(self, stream: SampleStream) -> None:
        """Unless it was done before: computes the vectors of the clips of a stream's replies."""
        collator, args = self.data_collator, self.args
        sizes = None if collator.cache is None else collator.cache.sizes
        for source, (_, rows, _) in enumerate(stream.sources):
            if isinstance(rows, DialogueSamples) and source not in stream.frozen:
                frozen = FrozenOutputs(
                    self.processing_class, collator.prompt, args.cache_frozen_gib, sizes, keep_memory=False
                )
                size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
                samples = SourceSamples(stream, source)
                stream.frozen[source] = frozen.compute(self.model_wrapped, samples, self.accelerator, size, workers)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As in transformers."""
        if self.args.cache_frozen_gib > 0 and self.is_in_train:  # for one evaluation alone it would not pay
            self.compute_frozen(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)


class _BeforeTraining(TrainerCallback):
    def __init__(self, trainer: FrozenClips):
        self.trainer = weakref.proxy(trainer)  # the trainer holds this

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.compute_frozen(self.trainer.train_dataset)
