"""The parts of the engine stage that need no engine; tests/jobs/test_edit_captions.py has the rest."""

import asyncio
import subprocess
import sys

from ip2p.recipe import REPOSITORY
from runtime.vllm import SharedLock, last_exception, root_cause

LOG = """\
EngineCore encountered a fatal error.
Traceback (most recent call last):
  File "core.py", line 1369, in run_engine_core
    engine_core.run_busy_loop()
  File "gpu_model_runner.py", line 3785, in _sample
    gen.set_offset(gen.get_offset() - 4)
RuntimeError: CPU Generator does not use offset
AsyncLLM output_handler failed.
Traceback (most recent call last):
  File "async_llm.py", line 700, in output_handler
    outputs = await engine_core.get_output_async()
vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.
"""


def test_log_names_the_exception_that_killed_the_engine():
    assert last_exception(LOG) == "RuntimeError: CPU Generator does not use offset"
    assert last_exception("WARNING something\n") == ""


def test_root_cause_is_the_first_exception_of_the_chain():
    first = KeyError("weight")
    last = RuntimeError()
    last.__cause__ = first
    assert root_cause(last) == "KeyError: 'weight'"
    assert root_cause(first) == "KeyError: 'weight'"


def test_exclusive_holder_is_alone_and_is_not_starved():
    async def order() -> list[str]:
        lock, events = SharedLock(), []

        async def use(name: str, held) -> None:
            async with held:
                events.append(f"{name} in")
                await asyncio.sleep(0.01)
                events.append(f"{name} out")

        await asyncio.gather(
            use("a", lock.shared()),
            use("b", lock.shared()),
            use("alone", lock.exclusive()),
            use("late", lock.shared()),
        )
        return events

    assert asyncio.run(order()) == ["a in", "b in", "a out", "b out", "alone in", "alone out", "late in", "late out"]


GPU_CONFIG = """
import ray
from ip2p.cli import read_recipe
from runtime.vllm import engine_config
ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False)
recipe = read_recipe("recipes/sd15.yaml")
config = engine_config(recipe, recipe.models.llm, "models.llm.path", recipe.instructions, chat=True)
assert config.runtime_env == {"env_vars": {"VLLM_USE_FLASHINFER_SAMPLER": "0"}}, config.runtime_env
assert config.placement_group_config is None
assert not {"enforce_eager", "enable_chunked_prefill"} & set(config.engine_kwargs)
assert config.engine_kwargs["gpu_memory_utilization"] == 0.9
"""


def test_gpu_engine_needs_no_compiler_and_keeps_its_defaults():
    ended = subprocess.run([sys.executable, "-c", GPU_CONFIG], cwd=REPOSITORY, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr
