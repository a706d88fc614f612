"""One copy of what a program holds twice: a tied table, which the lookup reads as a constant tensor and the head's
delegate as named data.

A .pte is a program and, behind it, segments: pieces of the file, each an offset and a size. All constant tensors are
one segment, and each piece of named data is one; ExecuTorch writes them one after the other. Nothing in the format
keeps one of them from lying inside of another, and the runtime looks at nothing but offset and size.
"""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program, _program_to_flatbuffer
from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
from executorch.exir._serialize.padding import aligned_size, pad_to
from executorch.exir.schema import DataLocation, DataSegment, Program
from executorch.exir.tensor import ALIGNMENT

_SEGMENT_ALIGNMENT = 128  # ExecuTorch's own choice
_WORTH = 1024  # bytes: less is left where it is
_COPIED = 1 << 24  # bytes at a time


def share(path: Path) -> int:
    """Rewrite a .pte so that named data whose bytes are those of a constant tensor point to that tensor.

    Returns:
        Bytes of named data that are no longer stored.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
        header = _ExtendedHeader.from_bytes(held[8 : 8 + _ExtendedHeader.EXPECTED_LENGTH])
        program = _flatbuffer_to_program(held[: header.program_size])
        base = header.segment_base_offset
        inside = _inside(program, held, base)
        if not inside:
            return 0
        taken = sum(program.segments[index].size for index in inside)
        sources = _rearrange(program, inside)
        target = path.with_name(f"{path.name}.shared")
        with target.open("wb") as out:
            out.write(_head(program))
            start = out.tell()
            for source, segment in zip(sources, program.segments, strict=True):
                if source is None:
                    continue
                out.write(bytes(start + segment.offset - out.tell()))
                for at in range(base + source, base + source + segment.size, _COPIED):
                    out.write(held[at : min(at + _COPIED, base + source + segment.size)])
    target.replace(path)
    return taken


def _inside(program: Program, held: mmap.mmap, base: int) -> dict[int, int]:
    """Segments of named data -> where in the segment of constants the same bytes stand."""
    if program.constant_segment is None or not program.constant_segment.offsets or not program.named_data:
        return {}
    constants = program.segments[program.constant_segment.segment_index]
    found = {}
    with memoryview(held) as view:
        for index in {each.segment_index for each in program.named_data}:
            segment = program.segments[index]
            if segment.size < _WORTH:
                continue
            with view[base + segment.offset : base + segment.offset + segment.size] as wanted:
                for offset in program.constant_segment.offsets:
                    start = base + constants.offset + offset
                    if offset + segment.size > constants.size:
                        continue
                    with view[start : start + segment.size] as there:
                        if there[:64] == wanted[:64] and there == wanted:
                            found[index] = offset
                            break
    return found


def _rearrange(program: Program, inside: dict[int, int]) -> list[int | None]:
    """Give all segments their new places, in the order of their offsets, and everything that names one its new number.

    Returns:
        For each of the new segments where its bytes stood, from the first segment's offset; None for those inside of
        the constants.
    """
    assert program.constant_segment is not None
    places: dict[int, DataSegment] = {}
    end = 0
    for index, segment in enumerate(program.segments):
        if index not in inside:
            places[index] = DataSegment(aligned_size(end, _SEGMENT_ALIGNMENT), segment.size)
            end = places[index].offset + segment.size
    constants = places[program.constant_segment.segment_index].offset
    for index, offset in inside.items():
        places[index] = DataSegment(constants + offset, program.segments[index].size)
    order = sorted(places, key=lambda index: (places[index].offset, index in inside))
    number = {index: new for new, index in enumerate(order)}
    sources = [None if index in inside else program.segments[index].offset for index in order]
    program.segments = [places[index] for index in order]
    program.constant_segment = replace(
        program.constant_segment, segment_index=number[program.constant_segment.segment_index]
    )
    for mutable in program.mutable_data_segments or []:
        mutable.segment_index = number[mutable.segment_index]
    for named in program.named_data or []:
        named.segment_index = number[named.segment_index]
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            if delegate.processed.location == DataLocation.SEGMENT:
                delegate.processed.index = number[delegate.processed.index]
    return sources


def _head(program: Program) -> bytes:
    """The file up to its first segment."""
    flat = _program_to_flatbuffer(program, constant_tensor_alignment=ALIGNMENT)
    length = aligned_size(_ExtendedHeader.EXPECTED_LENGTH, flat.max_alignment)
    size = length + len(flat.data)
    last = max(program.segments, key=lambda segment: segment.offset + segment.size)
    header = _ExtendedHeader(size, aligned_size(size, _SEGMENT_ALIGNMENT), last.offset + last.size)
    written = _insert_flatbuffer_header(flat.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", pad_to(header.to_bytes(), length))
    return bytes(pad_to(written, header.segment_base_offset))
