"""Labels as pieces: concatenations, slices, and whether two of them are the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from .labels import Axis, Label, Part, Row, Source, fresh, label_size, resolve, same_axes


def concat(parts: Sequence[Part], source: Source) -> Label:
    """Label of a concatenation."""
    pieces = glue(parts)
    size = sum(part.size for part in pieces)
    if size == 1:
        return Row.of(pieces[0]) if pieces and resolve(pieces[0].label) else ()
    if len(pieces) == 1 and pieces[0].whole:
        return pieces[0].label
    axis = Axis(size, source)
    axis.parts = pieces
    leaves = [leaf for part in pieces for leaf in resolve(part.label)]
    axis.feature = bool(leaves) and all(leaf.feature for leaf in leaves)
    return (axis,)


def slice_label(label: Label, start: int, stop: int, source: Source) -> Label:
    """Label of rows `start..stop` (step 1) of a dimension."""
    if start == 0 and stop == label_size(label):
        return label
    kept, leaves = rows_of(label, start, stop), resolve(label)
    if len(leaves) == 1 and leaves[0].carved and not all(part.whole for part in kept):
        return fresh(stop - start, source)  # rows of a table are those of one axis here, and of another one there
    if len(leaves) == 1 and leaves[0].carved and len(kept) == 1 and len(resolve(kept[0].label)) == 1:
        axis = Axis(stop - start, source)  # the same, and yet another where it meets one: a table's first rows
        axis.parts, axis.feature = kept, leaves[0].feature
        return (axis,)
    kept = tuple(piece for part in kept for piece in sources(part))
    return concat(kept, source) if kept else fresh(0, source)


def sources(part: Part) -> Sequence[Part]:
    """Rows of frames that were put together, as those of the sources that they are exactly; the rows if of none."""
    found, offset = list[Part](), 0
    for piece in () if part.whole else segments_of(part.label):
        if part.start <= offset and offset + piece.size <= part.stop:
            found.append(piece)
        offset += piece.size
    return found if sum(piece.size for piece in found) == part.size else [part]


def parts_of(label: Label) -> tuple[Part, ...]:
    """The label as pieces of a concatenation; a label that is none is one piece. Contiguous pieces are glued."""
    if isinstance(label, Row):
        return (label.part,)
    leaves = resolve(label)
    if len(leaves) == 1 and leaves[0].parts:
        return glue([inner for part in leaves[0].parts for inner in rows_of(part.label, part.start, part.stop)])
    return (Part(leaves, 0, label_size(leaves)),)


def settled(label: Label) -> Label:
    """The resolved label; what was cut up and has been put together again, as in a buffer, is what it was."""
    for axis in resolve(label):
        pieces = parts_of((axis,)) if axis.parts and len(axis.parts) > 1 else ()
        if len(pieces) == 1 and pieces[0].whole and axis not in pieces[0].label:
            axis.parts, axis.factors = None, pieces[0].label
    return resolve(label)


def rows_of(label: Label, start: int, stop: int) -> tuple[Part, ...]:
    """Pieces of rows `start..stop` of a label."""
    kept: list[Part] = []
    offset = 0
    for part in parts_of(label):
        low, high = max(start, offset), min(stop, offset + part.size)
        if low < high:
            base = part.start - offset
            kept.append(Part(part.label, low + base, high + base))
        offset += part.size
    return tuple(kept)


def segments_of(label: Label) -> tuple[Part, ...]:
    """`parts_of`, where frames put together from several sources are several pieces as well."""
    out: list[Part] = []
    for part in parts_of(label):
        leaves = resolve(part.label)
        pieces = parts_of(leaves[:1]) if part.whole and len(leaves) > 1 else ()
        area = label_size(leaves[1:])
        if len(pieces) > 1:
            out.extend(Part((*p.label, *leaves[1:]), p.start * area, p.stop * area) for p in pieces)
        else:
            out.append(part)
    return glue(out)


def glue(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join neighbouring pieces that are contiguous rows of the same label; drop empty ones."""
    out: list[Part] = []
    for part in parts:
        if part.size == 0:
            continue
        label = resolve(part.label)
        if out and out[-1].stop == part.start and label and same_axes(out[-1].label, label):
            out[-1] = Part(label, out[-1].start, part.stop)
        else:
            out.append(Part(label, part.start, part.stop))
    return tuple(out)


def same(first: Label, second: Label) -> bool:
    """Whether two labels are known to be the same positions in the same order."""
    one, two = parts_of(first), parts_of(second)
    return len(one) == len(two) and all(same_part(a, b) for a, b in zip(one, two, strict=True))


def same_part(a: Part, b: Part) -> bool:
    """Whether two pieces are the same rows of the same label. Single rows and padding have no axis to be told by."""
    if a.size == b.size == 1 and not (resolve(a.label) and resolve(b.label)):
        return True
    if a.size == b.size and is_padding(a) and is_padding(b):
        return True
    return a.start == b.start and a.stop == b.stop and same_axes(resolve(a.label), resolve(b.label))


def is_padding(part: Part) -> bool:
    """Whether a piece is rows of a new buffer into which nothing was written."""
    leaves = resolve(part.label)
    return bool(leaves) and part.whole and all(axis.blank and not axis.parts and not axis.why for axis in leaves)


def within(a: Part, b: Part) -> bool:
    """Whether a piece is among the rows of another."""
    return b.start <= a.start and a.stop <= b.stop and same_axes(resolve(a.label), resolve(b.label))


def apart(a: Part, b: Part) -> bool:
    """Whether two pieces are other rows of the same label."""
    return (a.stop <= b.start or b.stop <= a.start) and same_axes(resolve(a.label), resolve(b.label))
