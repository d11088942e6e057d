"""Attention of the segments of a packed row: each attends to a prefix elsewhere in the row, and causally to itself."""

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

logger = logging.getLogger(__name__)

# Largest allowed difference between the kernel and plain attention, relative to the largest output; it allows for the
# rounding of half precision.
TOLERANCE = 0.02
# Whether the kernel agreed with plain attention in this process; None: not tried yet.
_is_right: bool | None = None


def kernel_for(query: torch.Tensor) -> Callable | None:
    """Return torch's variable-length attention if it runs: on GPUs of compute capability 8 or up, in half precision."""
    if varlen_attn is None or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    return varlen_attn if torch.cuda.get_device_capability(query.device)[0] >= 8 and query.shape[-1] <= 256 else None


class Segments:
    """
    The attention of segments of a packed row in one call of torch's variable-length flash kernel.

    Args:
        segments: (start, end, start of its prefix, end of its prefix) of each segment, as offsets in the row; the
            segments follow each other and fill the row.
    """

    def __init__(self, segments: list[tuple[int, int, int, int]], device: torch.device):
        queries = [end - start for start, end, _, _ in segments]
        keys = [end - start + behind - before for start, end, before, behind in segments]
        places = [[*range(before, behind), *range(start, end)] for start, end, before, behind in segments]
        self.keys = torch.tensor([place for row in places for place in row], device=device)
        self.bounds = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (queries, keys)
        ]
        self.longest = max(queries), max(keys)

    def attend(self, kernel: Callable, query, key, value, scale: float | None) -> torch.Tensor:
        """Attention (1, length, heads, width) of states (1, heads, length, width)."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        # With fewer queries than keys, the kernel aligns its causal mask at the end, as needed here.
        output = kernel(
            query.contiguous(),
            key[self.keys],
            value[self.keys],
            *self.bounds,
            *self.longest,
            scale=scale,
            window_size=(-1, 0),
        )
        return output[None]


class SegmentBySegment:
    """
    The attention of segments of a packed row, as `Segments` takes them, one segment after the other.

    The row is split into parts and not sliced, because the gradient of each slice would have the size of the whole row.
    """

    def __init__(self, segments: list[tuple[int, int, int, int]], length: int, device: torch.device):
        cuts = sorted({0, length, *(edge for segment in segments for edge in segment)})
        self.sizes = [stop - start for start, stop in pairwise(cuts)]
        number, masks = {cut: index for index, cut in enumerate(cuts)}, {}
        self.plan = []  # of each segment: its parts, the parts of its prefix, and the mask
        for start, end, before, behind in segments:
            own, prefix = range(number[start], number[end]), range(number[before], number[behind])
            shape = end - start, behind - before + end - start
            if prefix and shape not in masks:
                masks[shape] = torch.ones(shape, dtype=torch.bool, device=device).tril(behind - before)
            self.plan.append((own, prefix, masks[shape] if prefix else None))

    def attend(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """Attention (1, length, heads, width) of states (1, heads, length, width)."""
        queries, keys, values = (states.split(self.sizes, dim=2) for states in (query, key, value))
        outputs = [
            F.scaled_dot_product_attention(
                _joined(queries, own),
                _joined(keys, (*prefix, *own)),
                _joined(values, (*prefix, *own)),
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scale,
            )
            for own, prefix, mask in self.plan
        ]
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _joined(parts: Sequence[torch.Tensor], chosen: Sequence[int]) -> torch.Tensor:
    return parts[chosen[0]] if len(chosen) == 1 else torch.cat([parts[index] for index in chosen], dim=2)


class PackedLayout:
    """
    The segments of a packed row, and their attention.

    Attention uses the variable-length kernel. It uses `plain` if there is no kernel, or if the first result of the
    kernel differed from that of `plain`, which is logged once.

    `attended` counts the layers that used this layout; `obstacle` is the reason why a layer could not.
    """

    attended: int = 0
    obstacle: str | None = None
    _segments: Segments | None = None
    _one_by_one: SegmentBySegment | None = None

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """Return the segments, as `Segments` takes them."""
        raise NotImplementedError

    def plain(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """Like `attend`, but by torch's `scaled_dot_product_attention`."""
        if self._one_by_one is None:
            self._one_by_one = SegmentBySegment(self.ranges(), query.shape[2], query.device)
        return self._one_by_one.attend(query, key, value, dropout, scale)

    def attend(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        """Attention (1, length, heads, width) of states (1, heads, length, width)."""
        kernel = None if dropout > 0 or _is_right is False else kernel_for(query)
        if kernel is not None and self._segments is None:
            self._segments = Segments(self.ranges(), query.device)
        if kernel is None or (_is_right is None and not self._kernel_is_right(kernel, query, key, value, scale)):
            return self._plain(query, key, value, dropout, scale)
        return self._segments.attend(kernel, query, key, value, scale)

    def _plain(self, query, key, value, dropout: float, scale: float | None) -> torch.Tensor:
        if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
            return self.plain(query, key, value, dropout, scale)
        # On a CPU, the backward pass of torch's attention takes several times longer in half precision than in fp32.
        with torch.autocast("cpu", enabled=False):
            output = self.plain(query.float(), key.float(), value.float(), dropout, scale)
        return output.to(query.dtype)

    @torch.no_grad()
    def _kernel_is_right(self, kernel: Callable, query, key, value, scale: float | None) -> bool:
        global _is_right
        wanted = self.plain(query, key, value, 0.0, scale)
        try:
            found = self._segments.attend(kernel, query, key, value, scale)
            far = (wanted - found).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
        except Exception as error:  # a kernel that does not run can raise many types of errors
            far, reason = float("inf"), f"{type(error).__name__}: {error}"
        else:
            reason = f"its result differs by {far:.3g} of the largest value"
        _is_right = far <= TOLERANCE
        if not _is_right:
            logger.warning("torch's variable-length attention is not used: %s.", reason)
        return _is_right
