"""The data sources: what a batch depends on, what is held out, the Markov floor, and the refusals."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mutransfer.errors import RequestError
from mutransfer.proxies.data import Data, load_data, markov, stdlib
from mutransfer.proxies.data.digits import Digits
from mutransfer.proxies.data.reading import read_tree, tree_sha256
from mutransfer.proxies.data.tokens import Tokens

T = 16
SOURCES = ["digits", "bytes", "markov", "text", "bin"]
TOKEN_SOURCES = SOURCES[1:]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "text.txt").write_bytes(random.integers(256, size=5000, dtype=np.uint8).tobytes())
    random.integers(1000, size=5000).astype("<u2").tofile(folder / "tokens.bin")
    return folder


@pytest.fixture(scope="session")
def sources(files: Path) -> dict[str, Data]:
    specs = {"text": f"text:{files / 'text.txt'}", "bin": f"bin:{files / 'tokens.bin'}"}
    return {name: load_data(specs.get(name, name), sequence_length=T) for name in SOURCES}


def equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def rows(data: Data) -> tuple[bytes, bytes]:
    """All training bytes and all held-out bytes."""
    assert isinstance(data, Tokens)
    return data.training.tobytes(), data.held_out.tobytes()


def refusal(spec: str, sequence_length: int = T) -> str:
    with pytest.raises(RequestError) as caught:
        load_data(spec, sequence_length)
    sentence = str(caught.value)
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence
    return sentence


# What a batch is


@pytest.mark.parametrize("name", SOURCES)
def test_shapes_and_dtypes(sources: dict[str, Data], name: str):
    data = sources[name]
    for (x, y), size in [(data.batch(0, 5, seed=0), 5), *((pair, len(pair[0])) for pair in data.validation())]:
        assert y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert int(y.min()) >= 0
        assert int(y.max()) < data.classes
        if name == "digits":
            assert (data.kind, data.inputs, data.classes) == ("images", 1, 10)
            assert (x.dtype, x.shape, y.shape) == (torch.float32, (size, 1, 8, 8), (size,))
        else:
            assert data.kind == "tokens"
            assert data.inputs == data.classes
            assert (x.dtype, x.shape, y.shape) == (torch.int64, (size, T), (size, T))
            assert int(x.max()) < data.inputs


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_depends_on_seed_and_step_only(sources: dict[str, Data], name: str):
    data = sources[name]
    first = data.batch(3, 8, seed=1)
    torch.manual_seed(7)
    np.random.seed(7)
    data.batch(2, 8, seed=1)
    assert equal(first, data.batch(3, 8, seed=1))
    assert not equal(first, data.batch(3, 8, seed=2))
    assert not equal(first, data.batch(4, 8, seed=1))
    # Neighbouring steps of one seed are not neighbouring seeds at one step.
    assert not equal(data.batch(3, 8, seed=4), data.batch(4, 8, seed=3))


@pytest.mark.parametrize("name", SOURCES)
def test_loading_again_gives_the_same_data(sources: dict[str, Data], files: Path, name: str):
    spec = {"text": f"text:{files / 'text.txt'}", "bin": f"bin:{files / 'tokens.bin'}"}.get(name, name)
    again = load_data(spec, sequence_length=T)
    assert again.sha256 == sources[name].sha256
    assert again.facts == sources[name].facts
    assert equal(again.batch(1, 4, seed=0), sources[name].batch(1, 4, seed=0))


@pytest.mark.parametrize("name", SOURCES)
def test_validation_is_fixed_small_and_of_one_size(sources: dict[str, Data], name: str):
    data = sources[name]
    before = data.validation()
    before[0][0].zero_()  # what a caller does to a batch stays with that caller
    data.batch(0, 4, seed=9)
    once, again = data.validation(), data.validation()
    assert not torch.equal(once[0][0], before[0][0])
    assert all(equal(one, other) for one, other in zip(once, again, strict=True))
    assert len({len(x) for x, _ in once}) == 1
    assert sum(len(x) for x, _ in once) <= (512 if data.kind == "images" else 64)


@pytest.mark.parametrize("name", TOKEN_SOURCES)
def test_targets_are_the_inputs_shifted_by_one(sources: dict[str, Data], name: str):
    data = sources[name]
    for x, y in [data.batch(0, 8, seed=0), *data.validation()]:
        assert torch.equal(x[:, 1:], y[:, :-1])
    if name == "text":
        text = Path(str(data.facts["path"])).read_bytes()
        x, y = data.batch(0, 8, seed=0)
        for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
            assert bytes([*inputs, targets[-1]]) in text[:4500]


# Digits


@pytest.mark.parametrize("size", [100, 479, 1437, 2000])
def test_an_epoch_of_digits_is_without_replacement(sources: dict[str, Data], size: int):
    data = sources["digits"]
    count = int(data.facts["training_images"])
    steps = -(-2 * count // size)
    images = np.concatenate([data.batch(step, size, seed=0)[0].numpy() for step in range(steps)])
    assert isinstance(data, Digits)
    everything = {image.tobytes() for image in data.training[0]}
    assert len(everything) == count == 1437
    first, second = images[:count], images[count : 2 * count]
    assert {image.tobytes() for image in first} == everything
    assert {image.tobytes() for image in second} == everything
    assert not np.array_equal(first, second)


def test_digits_labels_belong_to_their_images(sources: dict[str, Data]):
    """A model that only memorizes the training images reads the held-out ones: labels and split are in order."""
    data = sources["digits"]
    x_train, y_train = data.batch(0, 1437, seed=3)
    [(x, y)] = data.validation()
    nearest = torch.cdist(x.flatten(1), x_train.flatten(1)).argmin(dim=1)
    assert float((y_train[nearest] == y).float().mean()) > 0.97
    assert float(torch.cdist(x.flatten(1), x_train.flatten(1)).min()) > 0


def test_digits_are_standardized_by_the_training_part(sources: dict[str, Data]):
    x, _ = sources["digits"].batch(0, 1437, seed=0)
    assert abs(float(x.double().mean())) < 1e-6
    assert abs(float(x.double().std(correction=0)) - 1) < 1e-6


# Held-out files


def marked_files(folder: Path, count: int, suffix: str) -> list[bytes]:
    """Write ``count`` files in two folders, each with bytes that occur in no other file."""
    contents = [b"".join(b"%04d-%04d " % (number, line) for line in range(40)) for number in range(count)]
    for number, content in enumerate(contents):
        path = folder / f"part{number % 2}" / f"{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return contents


@pytest.mark.parametrize("name", ["bytes", "text"])
def test_files_are_held_out_whole(tmp_path: Path, name: str):
    contents = marked_files(tmp_path, 60, ".py")
    data = stdlib.load(T, root=str(tmp_path)) if name == "bytes" else load_data(f"text:{tmp_path}", T)
    seen = {"training": set(), "held out": set()}
    batches = {"training": [data.batch(step, 64, seed=0) for step in range(40)], "held out": data.validation()}
    for part, pairs in batches.items():
        for x, _ in pairs:
            for window in x.tolist():
                seen[part] |= {number for number, content in enumerate(contents) if bytes(window) in content}
    assert not seen["training"] & seen["held out"]
    assert len(seen["held out"]) >= 3
    assert len(seen["training"]) >= 45
    training, held_out = rows(data)  # the rows themselves, not only the windows that were drawn
    assert all((content in training) != (content in held_out) for content in contents)


def test_the_standard_library_comes_without_tests_and_packages(tmp_path: Path):
    marked_files(tmp_path, 60, ".py")
    before = stdlib.load(T, root=str(tmp_path)).sha256
    for path in ["test/a.py", "part0/tests/a.py", "site-packages/a.py", "part0/__pycache__/a.py", "notes.txt"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"not part of the corpus")
    assert stdlib.load(T, root=str(tmp_path)).sha256 == before


def test_the_standard_library_names_its_python(sources: dict[str, Data]):
    facts = sources["bytes"].facts
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(facts["training_tokens"]) > 1_000_000
    assert 0.05 < int(facts["held_out_files"]) / (int(facts["held_out_files"]) + int(facts["training_files"])) < 0.2
    assert b"class OrderedDict" in b"".join(rows(sources["bytes"]))


def test_copies_of_a_file_land_on_the_same_side(tmp_path: Path):
    for copy in ["a", "b"]:
        (tmp_path / copy).mkdir()
        contents = marked_files(tmp_path / copy, 30, ".txt")
    data = load_data(f"text:{tmp_path}", T)
    assert data.facts["held_out"] == "6 files"
    training, held_out = rows(data)
    assert {(training.count(content), held_out.count(content)) for content in contents} == {(2, 0), (0, 2)}


def test_a_small_or_uneven_folder_holds_out_its_end(tmp_path: Path):
    marked_files(tmp_path, 9, ".txt")
    assert load_data(f"text:{tmp_path}", T).facts["held_out"] == "last tenth of the bytes"
    (tmp_path / "huge.txt").write_bytes(bytes(range(256)) * 400)
    assert load_data(f"text:{tmp_path}", T).facts["held_out"] == "last tenth of the bytes"


def test_hidden_files_are_not_text(tmp_path: Path):
    marked_files(tmp_path, 12, ".txt")
    before = load_data(f"text:{tmp_path}", T).sha256
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"junk")
    (tmp_path / ".hidden").write_bytes(b"junk")
    assert load_data(f"text:{tmp_path}", T).sha256 == before


# Token files


def test_a_bin_file_is_split_at_its_end(tmp_path: Path):
    tokens = np.arange(1000, dtype="<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    data = load_data(f"bin:{tmp_path / 'tokens.bin'}", T)
    assert data.inputs == data.classes == 1000
    assert (data.facts["training_tokens"], data.facts["held_out_tokens"]) == (900, 100)
    assert max(int(data.batch(step, 64, seed=0)[1].max()) for step in range(20)) == 899  # the last target is reached
    assert min(int(x.min()) for x, _ in data.validation()) == 900
    assert max(int(y.max()) for _, y in data.validation()) == 999


def test_a_bin_folder_has_its_own_split(tmp_path: Path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(2000, 2100, dtype="<u2").tofile(tmp_path / "val.bin")
    data = load_data(f"bin:{tmp_path}", T)
    assert data.classes == 2100
    assert int(data.batch(0, 64, seed=0)[1].max()) < 1000
    assert all(int(x.min()) >= 2000 for x, _ in data.validation())


# The Markov language


def transition_matrix(language: markov.Markov) -> np.ndarray:
    """Dense [contexts, contexts], written out by loops."""
    V, k = language.classes, language.order
    contexts = list(itertools.product(range(V), repeat=k))
    row = {context: number for number, context in enumerate(contexts)}
    P = np.zeros((len(contexts), len(contexts)))
    for context in contexts:
        pairs = zip(language.successors[row[context]], language.probabilities[row[context]], strict=True)
        for symbol, probability in pairs:
            P[row[context], row[(*context[1:], int(symbol))]] += probability
    return P


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_markov_floor_is_the_entropy_of_a_sequence(order: int):
    """Oracle: power iteration for the stationary distribution, and every sequence of the language enumerated."""
    V, length = 5, 4
    language = markov.load(length, vocabulary=V, order=order, branching=3)
    P = transition_matrix(language)
    assert np.allclose(P.sum(axis=1), 1)
    occupation = np.full(len(P), 1 / len(P))
    for _ in range(2000):
        occupation = occupation @ P
    rate = -sum(occupation[i] * p * np.log(p) for i, row in enumerate(P) for p in row if p > 0)
    assert language.facts["entropy_rate"] == pytest.approx(rate, rel=1e-9)

    contexts = list(itertools.product(range(V), repeat=order))
    sequences = {context: occupation[number] for number, context in enumerate(contexts)}
    for _ in range(length + 1 - order):
        longer: dict[tuple[int, ...], float] = {}
        for sequence, probability in sequences.items():
            context = contexts.index(sequence[-order:])
            for symbol, p in zip(language.successors[context], language.probabilities[context], strict=True):
                longer[(*sequence, int(symbol))] = probability * p
        sequences = longer
    joint = -sum(p * np.log(p) for p in sequences.values() if p > 0)
    firsts = [sum(p for sequence, p in sequences.items() if sequence[0] == symbol) for symbol in range(V)]
    first = -sum(p * np.log(p) for p in firsts if p > 0)
    assert language.floor == pytest.approx((joint - first) / length, rel=1e-9)
    if order == 1:
        assert language.floor == pytest.approx(rate, rel=1e-9)
    else:
        assert language.floor is not None
        assert language.floor > rate


@pytest.mark.parametrize("order", [1, 2])
def test_the_true_distribution_reaches_the_markov_floor(order: int):
    """The best model there is scores the floor on sampled batches: sampler, targets and floor belong together."""
    language = markov.load(64, order=order)
    P = transition_matrix(language).reshape(len(language.stationary), -1)
    V = language.classes
    x, y = (tensor.numpy() for tensor in language.batch(0, 4000, seed=0))
    sequences = np.concatenate([x, y[:, -1:]], axis=1)
    total = 0.0
    for place in range(1, 65):
        if place < order:  # order 2 and one symbol seen: average over the symbol before it
            pairs = language.stationary.reshape(V, V)
            total += -np.log((pairs / pairs.sum(axis=1, keepdims=True))[sequences[:, 0], sequences[:, 1]]).sum()
            continue
        context = sum(sequences[:, place - order + j] * V ** (order - 1 - j) for j in range(order))
        following = sum(sequences[:, place - order + 1 + j] * V ** (order - 1 - j) for j in range(order))
        total += -np.log(P[context, following]).sum()
    assert total / y.size == pytest.approx(language.floor, rel=0.01)
    assert language.floor is not None
    assert language.floor < 0.5 * np.log(V)


def test_the_markov_chain_starts_stationary(sources: dict[str, Data]):
    language = sources["markov"]
    x, y = language.batch(0, 20000, seed=0)
    first = torch.bincount(x[:, 0], minlength=32) / len(x)
    last = torch.bincount(y[:, -1], minlength=32) / len(y)
    assert float((first - last).abs().max()) < 0.015


def test_markov_validation_is_a_stream_of_its_own(sources: dict[str, Data]):
    held_out = {tuple(row) for x, _ in sources["markov"].validation() for row in x.tolist()}
    assert len(held_out) == 64
    training = {tuple(r) for step in range(20) for r in sources["markov"].batch(step, 64, seed=0)[0].tolist()}
    assert len(training) == 20 * 64
    assert not held_out & training


@pytest.mark.parametrize(
    ("changed", "words"), [({"order": 0}, "order 0"), ({"order": 3}, "32768"), ({"branching": 1}, "1 successors")]
)
def test_impossible_languages_are_refused(changed: dict[str, int], words: str):
    with pytest.raises(RequestError, match="cannot be built") as caught:
        markov.load(T, **changed)
    assert words in str(caught.value)


# Hashes


def test_the_hash_changes_with_the_content(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    text, tokens = load_data(f"text:{path}", T).sha256, load_data(f"bin:{path}", T).sha256
    path.write_bytes(b"x" * 999 + b"y")
    assert load_data(f"text:{path}", T).sha256 != text
    assert load_data(f"bin:{path}", T).sha256 != tokens
    assert markov.load(T, language=0).sha256 != markov.load(T, language=1).sha256
    assert len(text) == 64


def test_the_hash_of_a_folder_tells_paths_from_contents():
    trees = [{"ab": b"c"}, {"a": b"bc"}, {"a": b"b", "c": b""}, {"a": b"c"}, {"b": b"c"}, {"a": b"", "b": b"c"}, {}]
    assert len({tree_sha256(tree) for tree in trees}) == len(trees)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path):
    for path in ["b", "a/z", "c/a", "a.txt"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    files = read_tree(tmp_path, lambda folder: folder == "c", lambda name: True)
    assert list(files.items()) == [("a.txt", b"a.txt"), ("a/z", b"a/z"), ("b", b"b")]


def test_a_folder_moved_elsewhere_keeps_its_hash(tmp_path: Path):
    (tmp_path / "here").mkdir()
    marked_files(tmp_path / "here", 12, ".txt")
    before = load_data(f"text:{tmp_path / 'here'}", T)
    (tmp_path / "here").rename(tmp_path / "there")
    after = load_data(f"text:{tmp_path / 'there'}", T)
    assert before.sha256 == after.sha256
    assert equal(before.batch(0, 4, seed=0), after.batch(0, 4, seed=0))
    (tmp_path / "there" / "part0" / "0.txt").rename(tmp_path / "there" / "part0" / "00.txt")
    assert load_data(f"text:{tmp_path / 'there'}", T).sha256 != before.sha256


# Refusals


def test_an_unknown_name_gets_the_nearest_one():
    assert refusal("digitz") == "unknown data 'digitz': did you mean 'digits'?"
    assert refusal("imagenet") == "unknown data 'imagenet': known are bin, bytes, digits, markov, text."


def test_a_path_is_given_where_one_is_taken():
    assert refusal("text") == "the data 'text' lacks its path: write text:PATH."
    assert refusal("bin:") == "the data 'bin:' lacks its path: write bin:PATH."
    assert refusal("digits:x") == "the data 'digits' takes no path, and 'digits:x' gives one: write digits."


@pytest.mark.parametrize("kind", ["text", "bin"])
def test_a_missing_path_is_named(tmp_path: Path, kind: str):
    assert refusal(f"{kind}:{tmp_path / 'no.txt'}").startswith(f"there is no {tmp_path / 'no.txt'}: give a ")
    (tmp_path / "train.bin").write_bytes(b"x" * 1000)
    if kind == "bin":
        assert refusal(f"bin:{tmp_path}") == (
            f"there is no {tmp_path / 'val.bin'}: give a folder with train.bin and val.bin, or one .bin file."
        )


@pytest.mark.parametrize("kind", ["text", "bin"])
def test_an_empty_corpus_is_named(tmp_path: Path, kind: str):
    (tmp_path / "empty").touch()
    assert refusal(f"{kind}:{tmp_path / 'empty'}").startswith(f"{tmp_path / 'empty'} is empty (0 tokens): ")


@pytest.mark.parametrize("count", [0, 12])
def test_an_empty_folder_is_named(tmp_path: Path, count: int):
    for number in range(count):
        (tmp_path / str(number)).touch()
    assert refusal(f"text:{tmp_path}").startswith(f"{tmp_path} is empty (0 tokens): ")


@pytest.mark.parametrize(("kind", "width"), [("text", 1), ("bin", 2)])
def test_a_tiny_corpus_is_told_what_it_needs(tmp_path: Path, kind: str, width: int):
    path = tmp_path / "tiny"
    path.write_bytes(b"\0" * 339 * width)
    assert refusal(f"{kind}:{path}") == (
        f"{path} has 33 tokens in its held-out part, and sequences of 16 tokens need at least 34: "
        "give a larger corpus or a sequence length of at most 15."
    )
    assert load_data(f"{kind}:{path}", sequence_length=15).validation()[0][0].shape == (2, 15)
    path.write_bytes(b"\0" * 340 * width)
    assert load_data(f"{kind}:{path}", T).validation()[0][0].shape == (2, T)
    path.write_bytes(b"\0" * 10 * width)
    assert refusal(f"{kind}:{path}").endswith("need at least 34: give a larger corpus.")


def test_a_tiny_training_part_is_told_too(tmp_path: Path):
    np.zeros(33, dtype="<u2").tofile(tmp_path / "train.bin")
    np.zeros(100, dtype="<u2").tofile(tmp_path / "val.bin")
    assert "33 tokens in its training part" in refusal(f"bin:{tmp_path}")


@pytest.mark.parametrize("name", TOKEN_SOURCES)
def test_sequences_have_a_length(files: Path, name: str):
    spec = {"text": f"text:{files / 'text.txt'}", "bin": f"bin:{files / 'tokens.bin'}"}.get(name, name)
    assert refusal(spec, sequence_length=0) == "the sequence length is 0: it should be at least 1 token."


def test_files_that_are_not_bare_tokens_are_refused(tmp_path: Path):
    (tmp_path / "odd.bin").write_bytes(b"x" * 1001)
    assert "1001 bytes, an odd number" in refusal(f"bin:{tmp_path / 'odd.bin'}")
    np.array([20240520, 1, 5000] + [0] * 5000, dtype="<i4").tofile(tmp_path / "headed.bin")
    assert "llm.c's header" in refusal(f"bin:{tmp_path / 'headed.bin'}")


def test_an_unreadable_path_is_named(tmp_path: Path):
    assert refusal("text:" + "x" * 5000).startswith("cannot read xxxx")
    if Path("/proc/self/mem").exists():  # fails to be read even by root
        (tmp_path / "broken.txt").symlink_to("/proc/self/mem")
        assert refusal(f"text:{tmp_path}").startswith(f"cannot read {tmp_path / 'broken.txt'} (")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a regular file nor a folder" in refusal(f"text:{tmp_path / 'pipe'}")


def test_a_forbidden_folder_is_not_left_out(request: pytest.FixtureRequest):
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    request.addfinalizer(lambda: shutil.rmtree(folder))
    marked_files(folder, 12, ".txt")
    folder.chmod(0o755)
    (folder / "part0").chmod(0)
    if os.geteuid() == 0:  # root reads everything
        os.seteuid(65534)
        request.addfinalizer(lambda: os.seteuid(0))
    assert refusal(f"text:{folder}").startswith(f"cannot read {folder / 'part0'} (")


def test_a_folder_without_python_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="holds no Python source files: give your own text as text:PATH"):
        stdlib.load(T, root=str(tmp_path))
