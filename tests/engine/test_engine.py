"""What the engine refuses, ends early, or survives; and that nothing stays behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase_adapters.errors import AdapterError, ConfigError
from onebase_engine import engine as engine_module
from onebase_engine.startup import start_engine
from support.engines import Driver, engine_config

PROMPT = torch.randint(3, 380, (200,), generator=torch.Generator().manual_seed(3)).tolist()


def test_more_tokens_than_the_context_are_refused_at_once(new_driver: Callable) -> None:
    driver = new_driver()
    refused = driver.submit("long", PROMPT, max_tokens=57)
    assert (refused.ending.finish_reason, refused.ending.error_kind) == ("error", "too_large")
    assert "257" in refused.ending.error
    assert "256" in refused.ending.error
    driver.submit("fits", PROMPT, max_tokens=56)
    driver.run()
    assert len(driver.results["fits"].tokens) == 56


def test_more_tokens_than_the_whole_cache_are_refused_at_once(new_driver: Callable) -> None:
    driver = new_driver(blocks=5)
    refused = driver.submit("large", PROMPT[:70], max_tokens=11)
    assert (refused.ending.finish_reason, refused.ending.error_kind) == ("error", "too_large")
    assert "81" in refused.ending.error
    assert "80" in refused.ending.error
    driver.submit("fits", PROMPT[:70], max_tokens=10)
    driver.run()
    assert len(driver.results["fits"].tokens) == 10


def test_a_limit_below_the_context_holds(new_driver: Callable) -> None:
    driver = new_driver(max_model_len=40)
    assert driver.engine.info.context == 40
    assert driver.submit("long", PROMPT[:35], max_tokens=6).ending.error_kind == "too_large"
    driver.submit("fits", PROMPT[:35], max_tokens=5)
    driver.run()


def test_what_was_never_loaded_and_what_has_no_tokens_is_refused(new_driver: Callable) -> None:
    driver = new_driver()
    assert driver.submit("unknown", [5], Path("/nowhere")).ending.error_kind == "adapter"
    assert driver.submit("empty", []).ending.error_kind == "internal"
    driver.submit("twice", [5])
    assert not driver.engine.idle or driver.engine.busy
    again = driver.engine.submit(driver.engine._sequences["twice"].request)
    assert again.error_kind == "internal"
    driver.run()


def test_a_cache_too_small_for_a_block_is_no_engine(llama: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        start_engine(engine_config(llama, blocks=0), progress=lambda _: None)
    assert caught.value.field == "cache_gib"


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["aside", "in prefill", "decoding"])
def test_an_abort_frees_everything_at_once(steps: int, new_driver: Callable, loras: list[Path]) -> None:
    driver = new_driver(max_batch_tokens=64)
    driver.submit("gone", PROMPT[:100], loras[0], max_tokens=100)
    driver.submit("stays", PROMPT[:20], loras[0], max_tokens=20)
    for _ in range(steps):
        driver.step()
    driver.engine.abort("gone")
    assert all(driver.engine._sequences)
    held = sum(len(sequence.blocks) for sequence in driver.engine.scheduler.sequences())
    assert driver.engine.stats().blocks_used == held
    driver.engine.abort("gone")  # twice, or never there: nothing
    driver.engine.abort("never there")
    del driver.results["gone"]
    driver.run()
    assert len(driver.results["stays"].tokens) == 20


def test_abort_all_ends_each_once(new_driver: Callable, loras: list[Path]) -> None:
    driver = new_driver(blocks=10)
    for index in range(8):
        driver.submit(str(index), PROMPT[: 10 + index], loras[index % 3], max_tokens=50)
    for _ in range(3):
        driver.step()
    for output in driver.engine.abort_all():
        driver.results[output.id].take(output)
    assert {result.ending.finish_reason for result in driver.results.values()} == {"abort"}
    driver.check_nothing_held()


def test_out_of_memory_costs_the_largest_piece_of_work_its_request(new_driver: Callable) -> None:
    calm = new_driver()
    for name, length in (("small", 10), ("large", 90), ("middle", 40)):
        calm.submit(name, PROMPT[:length])
        calm.run()

    driver = new_driver()
    forward = driver.engine.model.forward
    failures = 0

    def fail_once(chunks: list) -> object:
        nonlocal failures
        if sum(len(chunk.tokens) for chunk in chunks) > 100:
            failures += 1
            torch.empty(1 << 60)  # the allocator's own error
        return forward(chunks)

    driver.engine.model.forward = fail_once
    for name, length in (("small", 10), ("large", 90), ("middle", 40)):
        driver.submit(name, PROMPT[:length])
    driver.run()
    assert failures == 1
    assert driver.results["large"].ending.error_kind == "out_of_memory"
    for name in ("small", "middle"):
        assert driver.results[name].tokens == calm.results[name].tokens


class Failing:
    """Fails once, when the batch is large; otherwise it does what it stands for."""

    def __init__(self, function: Callable, error: Exception, driver: Driver) -> None:
        self._function, self._error, self._driver = function, error, driver
        self.failed = False

    def __call__(self, *arguments: Any) -> Any:
        if not self.failed and len(self._driver.engine.scheduler.running) == 3:
            self.failed = True
            self._function(*arguments)  # what it has left behind must not matter
            raise self._error
        return self._function(*arguments)


def watched(driver: Driver, adapter: Path) -> None:
    """Three requests, of which each phase of a step has something to do."""
    driver.submit("large", PROMPT[:60], prompt_logprobs=1, logprobs=2, max_tokens=6)
    driver.submit("drawn", PROMPT[:30], adapter, temperature=1.0, seed=1, top_k=5, prompt_logprobs=0, max_tokens=6)
    driver.submit("plain", PROMPT[:20], max_tokens=6)


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a bug")], ids=["memory", "bug"])
@pytest.mark.parametrize("place", ["forward", "read", "sample"])
def test_a_failure_anywhere_in_a_step_costs_no_more_than_its_requests(
    place: str, error: Exception, new_driver: Callable, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = new_driver()
    watched(calm, loras[0])
    calm.run()
    driver = new_driver()
    owner = {"forward": driver.engine.model, "read": driver.engine._reader, "sample": engine_module}[place]
    failing = Failing(getattr(owner, place), error, driver)
    monkeypatch.setattr(owner, place, failing)
    watched(driver, loras[0])
    driver.run()
    assert failing.failed
    lost = {"large"} if isinstance(error, MemoryError) else {"large", "drawn", "plain"}
    for name, result in driver.results.items():
        expected = calm.results[name]
        if name in lost:
            assert result.ending.error_kind == ("internal" if len(lost) == 3 else "out_of_memory")
        else:
            assert (result.tokens, result.prompt_logprobs) == (expected.tokens, expected.prompt_logprobs)


def test_any_other_failure_ends_those_that_took_part_and_no_more(new_driver: Callable) -> None:
    driver = new_driver(max_running=2)
    forward = driver.engine.model.forward

    def fail(chunks: list) -> object:
        driver.engine.model.forward = forward
        raise RuntimeError("the model broke")

    driver.engine.model.forward = fail
    for index in range(4):
        driver.submit(str(index), PROMPT[:20])
    driver.run()
    kinds = [result.ending.error_kind for result in driver.results.values()]
    assert kinds == ["internal", "internal", None, None]
    assert "the model broke" in driver.results["0"].ending.error


def overflowing(lora: Path, folder: Path) -> Path:
    """The adapter with numbers that are finite and whose products are not."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((lora / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"logprobs": 1}], ids=["greedy", "drawn", "logprobs"]
)
def test_an_adapter_that_overflows_ends_only_its_own_requests(
    sampling: dict, new_driver: Callable, loras: list[Path], tmp_path: Path
) -> None:
    broken = overflowing(loras[0], tmp_path / "broken")
    calm, driver = new_driver(), new_driver(blocks=12, max_batch_tokens=50)
    driver.load(broken)
    for index in range(3):
        for each in (calm, driver):
            each.submit(f"base{index}", PROMPT[: 20 + index], **sampling)
            each.submit(f"lora{index}", PROMPT[: 20 + index], loras[0], **sampling)
        driver.submit(f"broken{index}", PROMPT[: 20 + index], broken, **sampling)
    calm.run()
    driver.run()
    for name, result in driver.results.items():
        if name.startswith("broken"):
            assert (result.ending.error_kind, result.tokens) == ("adapter", [])
        else:
            assert result.tokens == calm.results[name].tokens, "pages that held NaN were passed on"


def test_more_adapters_than_slots_all_get_their_turn(new_driver: Callable, loras: list[Path]) -> None:
    roomy, tight = new_driver(), new_driver(max_adapters=1)
    for index in range(9):
        for driver in (roomy, tight):
            driver.submit(str(index), PROMPT[: 10 + index], loras[index % 3])
    roomy.run()
    tight.run()
    stats = tight.engine.stats()
    assert stats.adapters_loaded == 1
    assert stats.adapter_loads >= 3
    assert stats.adapter_evictions >= 2
    assert (roomy.engine.stats().adapter_loads, roomy.engine.stats().adapter_evictions) == (3, 0)
    assert {k: r.tokens for k, r in tight.results.items()} == {k: r.tokens for k, r in roomy.results.items()}


def test_a_stream_for_a_resident_adapter_does_not_starve_one_that_waits_for_a_slot(
    new_driver: Callable, loras: list[Path]
) -> None:
    driver = new_driver(max_adapters=1)
    driver.submit("popular", PROMPT[:5], loras[0], max_tokens=4)
    driver.step()
    patient = driver.submit("patient", PROMPT[:5], loras[1], max_tokens=4)
    steps = read = 0
    driver.engine._aside._clock = lambda: 0.01 * steps
    while patient.ending is None:
        # Counted from when it has been read: reading takes its time, on a thread of its own.
        read += driver.engine.residency.lacks_slot(str(loras[1]))
        assert read < 200, "never served"
        driver.submit(f"popular{steps}", PROMPT[:5], loras[0], max_tokens=4)
        driver.step()
        steps += 1
    driver.run()


def test_what_was_read_for_an_aborted_request_is_let_go(new_driver: Callable, loras: list[Path]) -> None:
    driver = new_driver(max_adapters=1)
    driver.submit("resident", PROMPT[:5], loras[2], max_tokens=40)
    driver.submit("cold", PROMPT[:5], loras[0])
    residency = driver.engine.residency
    while not residency.lacks_slot(str(loras[0])):
        driver.step()
    driver.engine.abort("cold")
    del driver.results["cold"]
    driver.step()
    assert not residency._loading
    driver.run()


def test_base_requests_do_not_wait_for_an_adapter_to_be_read(new_driver: Callable, loras: list[Path]) -> None:
    driver = new_driver(max_adapters=1)
    driver.submit("cold", PROMPT[:5], loras[0])
    base = driver.submit("base", PROMPT[:5], max_tokens=1)
    driver.step()
    assert base.ending is not None
    driver.run()


def test_files_that_have_gone_end_the_request_that_needs_them(new_driver: Callable, tiny_lora: Callable) -> None:
    adapters = [tiny_lora("llama", seed=seed) for seed in (11, 12)]
    driver = new_driver(adapters=adapters, max_adapters=1)
    (adapters[0] / "adapter_model.safetensors").unlink()
    lost = driver.submit("lost", PROMPT[:5], adapters[0])
    driver.submit("kept", PROMPT[:5], adapters[1])
    driver.run()
    assert (lost.ending.error_kind, lost.tokens) == ("adapter", [])
    assert driver.results["kept"].ending.finish_reason == "length"
    with pytest.raises(AdapterError):
        driver.load(adapters[0])


def test_counts_add_up(new_driver: Callable, loras: list[Path]) -> None:
    driver = new_driver()
    driver.submit("first", PROMPT[:40], loras[0], max_tokens=6)
    driver.run()
    driver.submit("second", PROMPT[:40], loras[0], max_tokens=6)
    driver.run()
    stats = driver.engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.cached_tokens) == (40 + 8, 12, 32)
    assert driver.results["second"].cached_tokens == 32
    assert stats.adapters_loaded == 3
    assert stats.adapter_bytes > 0
