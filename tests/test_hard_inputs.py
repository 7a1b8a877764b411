"""Integers, masks, scalars, rows of tables and larger sizes: what used to stay as in the example.

For each a right pair passes, and a fault that the example does not show is found.
"""

from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx_cases.graphs import graph, node
from torch import Tensor, nn

from normsurgery.inputs import Inputs
from normsurgery.verifying import hard_inputs, verify
from normsurgery.verifying.axes import Axis
from normsurgery.verifying.hard_ids import MOST_IDS, ids_wanted
from normsurgery.verifying.hard_inputs import inputs_of_a_graph
from normsurgery.verifying.hard_tables import embedding_rows

FLOAT, INT, BOOL = torch.float32, torch.int64, torch.bool


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Calls(nn.Module):
    """A forward that is a function of the inputs, and of the buffers that it is given."""

    def __init__(self, function, **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(*given, **dict(self.named_buffers()))


def cases_of(*given: Tensor, **options) -> dict[str, tuple[Tensor, ...]]:
    return {case.label: case.inputs.args for case in hard_inputs(Inputs(given), **options)}


def graph_cases_of(*given: Tensor, axes=(), **options) -> dict[str, tuple[Tensor, ...]]:
    cases = inputs_of_a_graph(Inputs(given), axes, **options)
    return {case.label: case.inputs.args for case in cases}


X = drawn(3, 8)
ROWS = {"x": (FLOAT, ["batch", 8])}
OUT = {"y": (FLOAT, ["batch", 8])}

# Words and token types; the types of the example are all 0.

WORDS, TYPES = drawn(11, 8), drawn(2, 8, seed=1)
IDS, ZEROS = torch.randint(2, 11, (2, 6)), torch.zeros(2, 6, dtype=INT)


class Bert(nn.Module):
    def __init__(self, words: Tensor = WORDS, types: Tensor = TYPES) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(words.clone())
        self.types = nn.Embedding.from_pretrained(types.clone())

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        return self.words(ids) + self.types(types)


def bert_graph(types: Tensor = TYPES, ignored: bool = False) -> onnx.ModelProto:
    tokens = (INT, ["batch", "length"])
    second = "only" if ignored else "found"
    return graph(
        [
            node("Gather", "words ids", "a"),
            node("Gather", "types kinds", "found"),
            node("Add", f"a {second}", "y"),
        ],
        {"ids": tokens, "kinds": tokens},
        {"y": (FLOAT, ["batch", "length", 8])},
        {"words": WORDS, "types": types, "only": TYPES[0]},
    )


def off_from(table: Tensor, row: int) -> Tensor:
    table = table.clone()
    table[row:] += 100
    return table


def test_token_types_that_are_all_0_in_the_example_are_varied():
    assert verify(Bert(), Bert(), (IDS, ZEROS)).passed
    assert not verify(Bert(), Bert(types=off_from(TYPES, 1)), (IDS, ZEROS)).passed
    assert verify(Bert(), bert_graph(), (IDS, ZEROS)).passed
    assert not verify(Bert(), bert_graph(off_from(TYPES, 1)), (IDS, ZEROS)).passed
    assert not verify(Bert(), bert_graph(ignored=True), (IDS, ZEROS)).passed


def test_ids_that_are_all_0_in_the_example_are_varied():
    assert not verify(Bert(), Bert(off_from(WORDS, 1)), (ZEROS, ZEROS)).passed
    cases = cases_of(ZEROS, ZEROS, model=Bert())
    assert cases["last ids"][0].unique().tolist() == [10]
    assert cases["last ids"][1].unique().tolist() == [1]
    assert "random mask" not in cases


def masked_graph(operator: str, mask: tuple, read: bool) -> onnx.ModelProto:
    nodes = [
        node("Cast", "m", "shown", to=onnx.TensorProto.FLOAT),
        node(operator, "x shown", "z"),
        node("Identity", "z" if read else "x", "y"),
    ]
    return graph(nodes, {**ROWS, "m": mask}, OUT)


ALL_TRUE, ALL_ONES = torch.ones(3, 8, dtype=BOOL), torch.ones(3, 8, dtype=INT)


@pytest.mark.parametrize(
    "mask", (ALL_TRUE, ALL_ONES, ~ALL_TRUE, ALL_TRUE[0], ALL_ONES[0], ALL_ONES.to(torch.uint16))
)
def test_a_mask_that_is_ignored_is_found_by_modules(mask):
    def hidden(x: Tensor, m: Tensor) -> Tensor:
        return x.masked_fill(m.bool() != bool(mask.flatten()[0]), 0.0)

    assert verify(Calls(hidden), Calls(hidden), (X, mask)).passed
    ignored = verify(Calls(hidden), Calls(lambda x, m: x * 1), (X, mask))
    failed = {c.case for c in ignored.comparisons if c.verdict.passed is False}
    assert {"padding", "random mask"} <= failed


@pytest.mark.parametrize("dtype", (BOOL, INT))
@pytest.mark.parametrize("shape", (["batch", 8], [8]))
def test_a_mask_that_is_ignored_is_found_in_graphs(dtype, shape):
    mask = torch.ones([3, 8][-len(shape) :], dtype=dtype)
    model = Calls(lambda x, m: x * m)
    assert verify(model, masked_graph("Mul", (dtype, shape), True), (X, mask)).passed
    assert not verify(model, masked_graph("Mul", (dtype, shape), False), (X, mask)).passed


def test_a_mask_that_hides_nothing_where_it_is_false():
    model = Calls(lambda x, m: x + m)
    mask = (BOOL, ["batch", 8])
    assert verify(model, masked_graph("Add", mask, True), (X, ~ALL_TRUE)).passed
    assert not verify(model, masked_graph("Add", mask, False), (X, ~ALL_TRUE)).passed


def test_an_image_of_zeros_is_not_left_black():
    image = (torch.zeros(3, 8, dtype=torch.uint8),)
    right, wrong = Calls(lambda x: x.float() / 255), Calls(lambda x: x.float() / 25)
    assert verify(right, Calls(lambda x: x.float() / 255), image).passed
    assert not verify(right, wrong, image).passed


def test_masks_are_random_but_for_the_first_element_of_a_row():
    mixed = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    column, single = torch.ones(2, 4, 1, dtype=BOOL), torch.ones(1, dtype=BOOL)
    cases = cases_of(mixed, column, single, torch.tensor(True), drawn(2, 3))
    new, other, one, scalar, x = cases["random mask"]
    assert new[:, 0].tolist() == [1, 0] and new.unique().tolist() == [0, 1]
    assert not torch.equal(new, mixed) and bool(other[:, 0].all()) and not bool(other.all())
    assert bool(one) and bool(scalar) and torch.equal(x, drawn(2, 3))
    assert cases["padding"][1][:, 2:].any() == torch.tensor(False)
    assert torch.equal(cases["padding"][0], mixed), "not all the same: what it hides is known"
    same = graph_cases_of(mixed, column, single, torch.tensor(True), drawn(2, 3))
    assert all(map(torch.equal, same["random mask"], cases["random mask"]))


def test_a_small_mask_changes_somewhere():
    for seed in range(20):
        mask = torch.ones(1, 2, dtype=BOOL)
        assert cases_of(mask, seed=seed)["random mask"][0].tolist() == [[True, False]]


# Numbers and scalars

LENGTHS = torch.tensor([8, 8, 8])


def up_to(x: Tensor, lengths: Tensor) -> Tensor:
    return (x * (torch.arange(8)[None] < lengths[:, None])).sum(-1)


def lengths_graph(read: bool) -> onnx.ModelProto:
    nodes = [
        node("Unsqueeze", "n last", "column"),
        node("Less", "places column", "inside"),
        node("Cast", "inside", "shown", to=onnx.TensorProto.FLOAT),
        node("Mul", "x shown", "z"),
        node("ReduceSum", f"{'z' if read else 'x'} last", "y", keepdims=0),
    ]
    weights = {"last": [1], "places": torch.arange(8)[None]}
    return graph(nodes, {**ROWS, "n": (INT, ["batch"])}, {"y": (FLOAT, ["batch"])}, weights)


def test_lengths_that_are_all_the_same_are_varied():
    given = (X, LENGTHS)
    assert verify(Calls(up_to), Calls(up_to), given).passed
    assert not verify(Calls(up_to), Calls(lambda x, n: x.sum(-1)), given).passed
    assert verify(Calls(up_to), lengths_graph(True), given).passed
    assert not verify(Calls(up_to), lengths_graph(False), given).passed


def scaled_graph(read: bool) -> onnx.ModelProto:
    nodes = [node("Div", f"x {'t' if read else 'baked'}", "y")]
    return graph(nodes, {**ROWS, "t": (FLOAT, [])}, OUT, {"baked": 0.75})


def test_a_temperature_that_is_baked_in_is_found():
    given, model = (X, torch.tensor(0.75)), Calls(lambda x, t: x / t)
    assert verify(model, Calls(lambda x, t: x / t), given).passed
    assert not verify(model, Calls(lambda x, t: x / 0.75), given).passed
    assert verify(model, scaled_graph(True), given).passed
    assert not verify(model, scaled_graph(False), given).passed


def test_ranges_of_numbers_and_scalars():
    given = (X, LENGTHS, torch.tensor(5), torch.tensor(1), torch.tensor([4, 9, 6]))
    cases = cases_of(*given, torch.tensor(0.75), torch.tensor(0.0))
    first, last, random = (cases[f"{which} ids"] for which in ("first", "last", "random"))
    assert [t.unique().tolist() for t in first[1:5]] == [[0], [0], [1], [4]]
    assert [t.unique().tolist() for t in last[1:5]] == [[8], [5], [1], [9]]
    assert int(random[1].min()) >= 0 and int(random[1].max()) <= 8 and 0 <= int(random[2]) <= 5
    scalars = [tuple(map(float, cases[label][5:])) for label in ("random", "batch 7", "zeros")]
    assert scalars == [(0.375, 0.5), (1.5, 2.0), (0.75, 0.0)]
    assert 0 <= int(cases["batch 1"][1]) <= 8, "the range is that of the whole example"


# Rows of tables

TABLE = drawn(500, 8)
TOKENS = torch.randint(0, 100, (2, 6), generator=torch.Generator().manual_seed(0))


def with_row_off(row: int) -> Tensor:
    table = TABLE.clone()
    table[row] *= -1
    return table


def looked_up(ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding(ids.long(), table)


def table_graph(table: Tensor, *shape: int | str) -> onnx.ModelProto:
    return graph(
        [node("Gather", "table ids", "y")],
        {"ids": (INT, shape)},
        {"y": (FLOAT, [*shape, 8])},
        {"table": table},
    )


def test_every_row_of_a_table_is_asked_for():
    table = nn.Embedding.from_pretrained
    assert verify(table(TABLE), table(TABLE.clone()), (TOKENS,)).passed
    assert not verify(table(TABLE), table(with_row_off(237)), (TOKENS,)).passed
    for ids in (TOKENS, TOKENS.int()):
        right, same = Calls(looked_up, table=TABLE), Calls(looked_up, table=TABLE)
        assert verify(right, same, (ids,)).passed
        assert not verify(right, Calls(looked_up, table=with_row_off(237)), (ids,)).passed


def test_every_row_of_a_table_in_a_graph_is_asked_for():
    model = nn.Embedding.from_pretrained(TABLE)
    given, right = (TOKENS,), table_graph(TABLE, "batch", "length")
    wrong = table_graph(with_row_off(237), "batch", "length")
    assert verify(model, right, given).passed
    assert not verify(model, wrong, given).passed
    assert not verify(right, wrong, given).passed


def test_a_graph_of_fixed_shape_is_asked_for_the_rows_in_a_few_inputs():
    model = Calls(looked_up, table=TABLE[:48])
    for row in (0, 20, 33, 47):
        wrong = table_graph(with_row_off(row)[:48], 2, 6)
        assert not verify(model, wrong, (TOKENS % 40,)).passed
    assert verify(model, table_graph(TABLE[:48], 2, 6), (TOKENS % 40,)).passed


def test_many_ids_are_all_rows_or_spread_over_the_table():
    batch = Axis("batch", ((0, 0),), 2)
    for cases in (
        cases_of(TOKENS, model=nn.Embedding(500, 8)),
        graph_cases_of(TOKENS, axes=(batch,), rows={0: 500}),
    ):
        (ids,) = cases["many ids"]
        assert ids.shape == (84, 6) and sorted(ids.unique().tolist()) == list(range(500))
        assert "many ids 2" not in cases
    (ids,) = graph_cases_of(TOKENS, axes=(batch,), rows={0: 70_000})["many ids"]
    assert ids.numel() <= 264 and int(ids.min()) == 0 and int(ids.max()) == 69_999
    assert ids_wanted(4096) == MOST_IDS and ids_wanted(10**6) == 256 and ids_wanted(9) == 9
    limited = Axis("batch", ((0, 0),), 2, high=20)
    assert graph_cases_of(TOKENS, axes=(limited,), rows={0: 500})["many ids"][0].shape == (20, 6)
    fixed = graph_cases_of(TOKENS, rows={0: 500})
    many = [fixed[f"many ids{end}"][0] for end in ("", " 2", " 3", " 4")]
    seen = torch.stack(many).unique()
    assert len(seen) == 48 and int(seen.min()) == 0 and int(seen.max()) == 499


def test_large_inputs_beside_ids_keep_the_batch_small():
    cases = cases_of(TOKENS[:, :2], drawn(2, 3, 200, 200), model=nn.Embedding(500, 8))
    assert "many ids" not in cases, "the model does not take them"
    image = drawn(2, 3, 200, 200)
    model = Calls(lambda ids, x, table: F.embedding(ids, table) + x.mean(), table=TABLE)
    ids, x = cases_of(TOKENS[:, :2], image, model=model)["many ids"]
    assert len(ids) == len(x) == 8


def test_tables_are_found_through_the_run_and_masks_index_none():
    def forward(ids: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        positions = mask.cumsum(-1)
        return F.embedding(ids.long(), table) + F.embedding(positions, table[:9])

    model = Calls(forward, table=TABLE)
    assert embedding_rows(model, Inputs((TOKENS.int(), torch.ones_like(TOKENS)))) == {0: 500}
    assert embedding_rows(nn.Linear(8, 2), Inputs((X,))) == {}
    assert embedding_rows(nn.Embedding(3, 2), Inputs((TOKENS,))) == {}, "it does not run"


# Sizes


def first_seven() -> onnx.ModelProto:
    nodes = [node("Slice", "x start end", "z"), node("Identity", "z", "y")]
    output = {"y": (FLOAT, ["other", 8])}
    return graph(nodes, ROWS, output, {"start": [0], "end": [7]})


def test_a_batch_that_is_cut_off_at_7_is_found():
    whole = graph([node("Identity", "x", "y")], ROWS, OUT)
    assert verify(nn.Identity(), whole, (X,)).passed
    cut = verify(nn.Identity(), first_seven(), (X,))
    assert {c.case for c in cut.comparisons if c.verdict.passed is False} == {"batch 17"}
    assert not verify(nn.Identity(), Calls(lambda x: x[:7]), (X,)).passed


def placed(table: Tensor) -> onnx.ModelProto:
    nodes = [
        node("Shape", "x", "size", start=1, end=2),
        node("Slice", "table start size", "rows"),
        node("Add", "x rows", "y"),
    ]
    port = (FLOAT, ["batch", "length", 8])
    return graph(nodes, {"x": port}, {"y": port}, {"table": table, "start": [0]})


def test_positions_that_are_wrong_from_the_8th_on_are_found():
    model, given = Calls(lambda x, table: x + table[: x.shape[1]], table=TABLE), (drawn(2, 4, 8),)
    assert verify(model, placed(TABLE), given).passed
    assert not verify(model, placed(off_from(TABLE, 8)), given).passed


def test_large_samples_are_not_tried_17_at_a_time():
    cases = cases_of(torch.zeros(2, 3, 200, 200))
    assert "batch 7" in cases and "batch 17" not in cases
    axis = Axis("batch", ((0, 0),), 2)
    assert "batch 17" not in graph_cases_of(torch.zeros(2, 3, 200, 200), axes=(axis,))
    declared = Axis("batch", ((0, 0),), 2, high=17)
    assert "batch 17" in graph_cases_of(torch.zeros(2, 3, 200, 200), axes=(declared,))


# What no case could be made of


@pytest.mark.parametrize("shape", ((3, 0), (0, 3), (2, 0, 4, 4), (0,)))
def test_inputs_without_elements_do_no_harm(shape):
    cases = [*cases_of(X, torch.zeros(shape)), *graph_cases_of(X, torch.zeros(shape))]
    assert {"outlier channel", "one NaN", "random"} <= set(cases)


def test_a_model_with_an_empty_input_is_verified():
    def both(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], 1)

    assert verify(Calls(both), Calls(both), (X, torch.zeros(3, 0))).passed


@pytest.mark.parametrize("dtype", (torch.uint16, torch.uint32, torch.uint64, torch.int8))
def test_every_type_of_integers_is_varied(dtype):
    given = (torch.arange(8).to(dtype),)
    for cases in (cases_of(*given), graph_cases_of(*given)):
        assert all(case[0].dtype is dtype for case in cases.values())
        assert cases["last ids"][0].tolist() == [7] * 8
    right = Calls(lambda x: x.float())
    assert verify(right, Calls(lambda x: x.float()), given).passed
    assert not verify(right, Calls(lambda x: torch.arange(len(x)).float()), given).passed


@pytest.mark.parametrize("largest", (2**63 - 1, 2**62))
def test_the_largest_integers_are_in_range(largest):
    given = torch.tensor([[largest, -(2**62)], [3, largest]])
    for ids in (given, torch.full((2, 2), largest), given.clamp(min=0)):
        cases = cases_of(ids)
        assert int(cases["last ids"][0].max()) == largest
        assert bool((cases["random ids"][0] <= largest).all())
    right = Calls(lambda x: x % 7)
    assert verify(right, Calls(lambda x: x % 7), (given,)).passed
    assert (
        cases_of(torch.full((2,), 2**63 - 1).to(torch.uint64))["last ids"][0].tolist()
        == [2**63 - 1] * 2
    )


def test_every_case_is_the_same_for_the_same_seed():
    given = (TOKENS, torch.ones_like(TOKENS), drawn(2, 8), torch.tensor(0.5))
    for make in (
        lambda seed: cases_of(*given, model=None, seed=seed),
        lambda seed: graph_cases_of(*given, rows={0: 500}, padding=3, seed=seed),
    ):
        first, again, other = make(1), make(1), make(2)
        for label, tensors in first.items():
            torch.testing.assert_close(
                tensors, again[label], rtol=0, atol=0, equal_nan=True, msg=label
            )
        assert not all(map(torch.equal, first["random mask"], other["random mask"]))


def test_padding_is_an_id_of_the_words_and_not_of_the_types():
    ids, kinds = torch.tensor([[3, 4, 5, 6]]), torch.zeros(1, 4, dtype=INT)
    cases = graph_cases_of(ids, kinds, rows={0: 9, 1: 2}, padding=7)
    assert cases["padding"][0][0, 2:].tolist() == [7, 7]
    assert cases["padding"][1].tolist() == kinds.tolist()
