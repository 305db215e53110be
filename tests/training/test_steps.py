"""What makes steps quick or small changes nothing about them: graphs, products made at once, checkpoints, kernels."""

from __future__ import annotations

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import sdops_kernels
import torch

from sdops.core.source import read
from sdops.formats import open_source
from sdops.trainers import trainer
from sdops.training import graphs, kernels
from sdops.training.config import read as settings
from sdops.training.feeder import Batch
from sdops.training.optimizer import Optimizer
from sdops.training.parameters import Parameter, Parameters
from sdops.training.tokens import CHUNK, END, LENGTH, START, Tokens
from tests.training.test_bars import tensors


@pytest.fixture
def built(tiny, monkeypatch):
    """built(dtype, **settings) -> the tiny model with a LoRA on it, and what it learns."""
    from sdops.verbs import _train_model
    from sdops.verbs._train_origin import open_origin

    def make(dtype=torch.float64, method="lora", **given):
        monkeypatch.setattr(_train_model, "dtype_of", lambda *_: dtype)
        config = settings(method, None, {"model": str(tiny), **given})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _train_model.build(open_origin(config), config)
        made = trainer(method)(model, config)
        parameters = Parameters(made.parameters(), model.device, dtype)
        with torch.no_grad():
            parameters.flat.add_(0.05 * torch.randn(parameters.flat.shape, generator=torch.Generator().manual_seed(1)))
        return model, made, parameters

    return make


def batch_of(model, size=2):
    draws = torch.Generator().manual_seed(2)
    shape = (size, 4, 16, 16)
    latents, noise = (torch.randn(shape, generator=draws) for _ in range(2))
    context = torch.randn(size, LENGTH, 32, generator=draws, dtype=model.dtype, requires_grad=True)
    steps = torch.tensor([100, 700][:size])
    ones = torch.ones(size)
    return Batch(latents, noise, steps, model.abar.float()[steps], ones, ones / size, None, None, {}, context)


def gradients(model, method, parameters):
    batch = batch_of(model)
    method.use(parameters.current())
    method.loss(batch).mean().backward()
    return parameters.gradient.clone(), batch.context.grad


def test_keys_and_values_at_once_are_those_of_each_layer(built, monkeypatch):
    found = gradients(*built(rank=4, ranks="attention=4/2 cross=3 feedforward"))
    model, method, parameters = built(rank=4, ranks="attention=4/2 cross=3 feedforward")
    monkeypatch.setattr(model.cross_attention, "begin", lambda _: None)
    for one, each in zip(found, gradients(model, method, parameters), strict=True):
        torch.testing.assert_close(one, each, rtol=1e-6, atol=1e-12)  # the flat buffer is float32


def test_keys_and_values_that_learn_are_their_own(built):
    """Custom diffusion computes with other matrices, which nothing made before may stand for."""
    model, method, parameters = built(method="custom-diffusion", tokens=("it",))
    with torch.no_grad():
        parameters.views()["words:clip_l"].normal_()
    learnt, _ = gradients(model, method, parameters)
    assert bool((learnt[: parameters.groups[0].stop] != 0).any())


def test_checkpointing_gives_the_same_gradients(built):
    model, method, parameters = built()
    wanted = gradients(model, method, parameters)
    parameters.gradient.zero_()
    model.save_memory(dropout=False)
    for one, each in zip(gradients(model, method, parameters), wanted, strict=True):
        torch.testing.assert_close(one, each, rtol=1e-6, atol=1e-12)


def test_the_kernels_way_of_a_lora_gives_the_same_gradients(built, monkeypatch):
    """By the plain formulation of `sdops_kernels`; where its kernels do not work, that is told once per shape."""
    wanted = gradients(*built(torch.float32))

    class Choices(sdops_kernels.Choices):
        def measure(self, *_):
            raise RuntimeError("no GPU\nand more")

    package = SimpleNamespace(Choices=Choices, lora_linear=sdops_kernels.lora_linear)
    monkeypatch.setattr(
        trainer("lora").__module__ + ".lora_linear", lambda _: kernels.LoraLinear(package, (RuntimeError,))
    )
    with pytest.warns(UserWarning, match="torch computes them: no GPU"):
        found = gradients(*built(torch.float32))
    for one, each in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, each, rtol=1e-3, atol=1e-6)


def test_there_are_no_kernels_without_a_gpu():
    assert kernels.lora_linear(torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------------------- graphs


@pytest.fixture
def recorder(monkeypatch):
    """CUDA's graphs, played by a stand-in that runs the recorded work again on the recorded tensors."""
    log = SimpleNamespace(recorded=0, replayed=0, fails=False)
    original = graphs.Graphs.__init__

    def init(self, work, state, note):
        original(self, work, state, note)
        self._work = lambda batch: setattr(log, "last", (work, batch)) or work(batch)

    class Graph:
        def replay(self):
            work, inputs = self.work
            self.loss.copy_(work(inputs))
            log.replayed += 1

        def pool(self):
            return 1

    @contextlib.contextmanager
    def record(graph, pool):
        log.recorded += 1
        yield
        if log.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
        graph.work = log.last

    def recording(self, batch):
        graph, inputs, loss = plain(self, batch)
        graph.loss = loss
        return graph, inputs, loss

    class Stream:  # a class: libraries that are imported meanwhile name it in annotations
        def wait_stream(self, _):
            pass

    plain = graphs.Graphs._record
    monkeypatch.setattr(graphs.Graphs, "__init__", init)
    monkeypatch.setattr(graphs.Graphs, "_record", recording)
    monkeypatch.setattr(graphs, "why_not", lambda *_, **__: "")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return log


@pytest.mark.parametrize("given", [{}, {"accumulate": 2, "dropout": 0.3}], ids=["step", "accumulated"])
@pytest.mark.parametrize("fails", [False, True], ids=["recorded", "refused"])
def test_recorded_steps_do_what_launched_steps_do(train, tmp_path, recorder, monkeypatch, given, fails):
    """Also when recording is refused midway: what warming up changed was put back."""
    recorder.fails = fails
    common = {"steps": 3, "rank": 2, "lr": 1e-2, "batch": 2, "save_dtype": "fp32", "validate_every": 0, **given}
    told: list[str] = []
    train("lora", **common, output=str(tmp_path / "plain.safetensors"), graph=False)
    train("lora", **common, say=told.append)
    assert tensors(tmp_path / "out.safetensors") == tensors(tmp_path / "plain.safetensors")
    assert recorder.recorded == 1
    assert recorder.replayed == (0 if fails else 3 * given.get("accumulate", 1))
    assert ("CUDA cannot record the step" in " ".join(told)) == fails


def test_why_steps_are_not_recorded_is_told():
    cuda = torch.device("cuda")
    assert graphs.why_not(cuda, repeats=True, dropout=True, checkpointing=False) == ""
    assert "random numbers" in graphs.why_not(cuda, repeats=True, dropout=True, checkpointing=True)
    assert "not alike" in graphs.why_not(cuda, repeats=False, dropout=False, checkpointing=False)
    assert "cpu" in graphs.why_not(torch.device("cpu"), repeats=True, dropout=False, checkpointing=False)


# --------------------------------------------------------------------------------------------------------------- text


def ids_of(model, tokens, text, chunks=1):
    return {"clip_l": torch.tensor(tokens.rows([text], model.encoders[0].pad, chunks))}


def test_clip_skip_is_the_encoder_without_its_last_layer(built):
    model, _, _ = built(torch.float32, clip_skip=1)
    shorter = copy.deepcopy(model.encoders[0].module)
    layers = next(module for module in shorter.modules() if isinstance(module, torch.nn.ModuleList))
    del layers[-1]
    ids = ids_of(model, Tokens({}, 49408), "a photo of a dog")
    wanted = shorter(ids["clip_l"]).last_hidden_state
    torch.testing.assert_close(model.text(ids)[0], wanted, rtol=0, atol=0)


def test_long_texts_are_read_in_chunks(built):
    """As the web UIs do: 75 tokens each between begin and end, encoded alone, joined."""
    model, _, _ = built(torch.float32)
    tokens = Tokens({"it": 3}, 49408)
    long = "red " * 74 + "it dog"
    rows = tokens.rows([long, "cat"], 49407, 3)
    assert [len(row) for row in rows] == [2 * LENGTH, 2 * LENGTH]
    assert rows[0][CHUNK] == END  # 74 words: the three vectors of `it` did not fit any more
    assert rows[0][LENGTH : LENGTH + 6] == [START, 49408, 49409, 49410, *Tokens({}, 0).of("dog"), END]
    assert rows[1][LENGTH : LENGTH + 2] == [START, END]
    assert tokens.rows(["red " * 74 + "it dog"], 49407, 1)[0] == rows[0][:LENGTH]
    plain = Tokens({}, 49408)
    both = model.text(ids_of(model, plain, "red " * 75 + "a dog", 3))[0]
    apart = [model.text(ids_of(model, plain, text))[0] for text in ("red " * 75, "a dog")]
    torch.testing.assert_close(both, torch.cat(apart, dim=1), rtol=1e-5, atol=1e-6)


def test_a_short_text_beside_a_long_one_is_filled_with_empty_chunks(train, circles, tmp_path):
    """The same from the cache as encoded in every step; words learn from their place in the second chunk."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, text in enumerate(("a dog", "red " * 80 + "it")):
        (folder / f"{index}.png").write_bytes((circles / f"yellow_circle_{index}.png").read_bytes())
        (folder / f"{index}.txt").write_text(text)
    common = {"images": str(folder), "batch": 2, "steps": 1, "validate_every": 1, "validation": 1}
    cached = train("lora", **common, rank=1, lr=1e-9)
    learnt = train("ti", **common, tokens=("it",), init=("it",), lr=1e-2)
    assert learnt.data["losses"]["0"] == pytest.approx(cached.data["losses"]["0"], rel=1e-5)
    words = torch.load(tmp_path / "out.pt")["string_to_param"]["*"]
    start = train("ti", **common, tokens=("it",), init=("it",), lr=1e-30)
    assert start
    assert not torch.equal(words, torch.load(tmp_path / "out.pt")["string_to_param"]["*"])


@pytest.mark.parametrize(("dtype", "saved"), [("bf16", "BF16"), ("fp16", "F16")])
def test_half_precision_learns_what_full_precision_learns(train, tmp_path, dtype, saved):
    """What learns, its moments and the alphas stay float32; the gradients' scale of float16 does not show."""
    given = {"steps": 3, "batch": 1, "rank": 2, "lr": 1e-2, "validate_every": 3, "validation": 1}
    full = train("lora", **given).data["losses"]
    half = train("lora", **given, dtype=dtype, save_dtype=dtype).data["losses"]
    assert full["0"] - full["3"] > 0.005
    assert half["0"] - half["3"] == pytest.approx(full["0"] - full["3"], rel=0.1)
    with contextlib.closing(open_source(tmp_path / "out.safetensors")) as source:
        dtypes = {key.rpartition(".")[2]: spec.dtype for key, spec in source.specs.items()}
        assert dtypes == {"weight": saved, "alpha": "F32"}
        assert source.metadata["ss_mixed_precision"] == dtype
    with contextlib.closing(open_source(tmp_path / "out.state.safetensors")) as source:
        assert {spec.dtype for spec in source.specs.values()} == {"F32"}


def test_blocks_learn_at_their_own_rates(built, train, tmp_path):
    blocks = "1,IN01=0,OUT03=0.5"
    _, made, parameters = built(lr=1e-2, block_lr=blocks)
    rates = {part.name: part.lr for part in made.parameters()}
    for block, rate in (("down_blocks.0.attentions.0", 0), ("up_blocks.1.attentions.0", 0.005)):
        assert {each for name, each in rates.items() if name.startswith(f"unet:{block}.")} == {rate}
    assert {group.lr for group in parameters.groups} == {0, 0.005, 0.01}
    given = {"steps": 2, "batch": 1, "rank": 2, "lr": 1e-2, "block_lr": blocks, "validate_every": 0}
    train("lora", **given)
    with contextlib.closing(open_source(tmp_path / "out.safetensors")) as source:
        changed = {key: any(bytes(read(source, key))) for key in source.specs if "lora_up" in key}
    assert {key for key in changed if not changed[key]} == {key for key in changed if "_down_blocks_0_" in key}
    assert len(set(changed.values())) == 2


def test_the_average_is_that_of_the_decay():
    parameters = Parameters([Parameter("a", torch.zeros(4), 0.1)], torch.device("cpu"), torch.float32)
    optimizer = Optimizer(parameters, decay=0.75)
    optimizer.set_rates(1.0, 0)
    wanted = torch.zeros(4)
    for _ in range(5):
        parameters.gradient.copy_(torch.randn(4))
        optimizer.step(torch.tensor(1.0))
        optimizer.follow()
        wanted = 0.75 * wanted + 0.25 * parameters.flat.detach()
    torch.testing.assert_close(optimizer.average, wanted)
