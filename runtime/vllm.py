"""vLLM in Ray Data: engines that ask, hand the answers to a reader, and ask again.

Ray internals this depends on (Ray 2.60):

- the stage `vLLMEngineStage` of a processor, its `fn` and its `fn_constructor_kwargs`
- `StatefulStageUDF` with its columns `__idx_in_batch` and `__inference_error__`
- `vLLMEngineStageUDF` with its `llm.generate_async` and `llm.engine`, and `VLLM_FATAL_ERRORS`

vLLM is imported in the engines' processes only: the import takes seconds.
"""

import asyncio
import json
import logging
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.llm._internal.batch.stages.base import StatefulStageUDF
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ip2p.recipe import Instructions, Judge, ModelRef, Recipe, locate
from ip2p.records import Answer
from runtime.connect import uses_gpu
from runtime.guard import CrashLedger
from runtime.rows import TASK_CPUS

log = logging.getLogger("ip2p")

Row = dict[str, Any]

ENGINE_CPUS = 0.5  # less than a whole one: on two cores tasks need room as well
BATCHES_IN_ENGINE = 4
LOST = 2  # begins of a batch without an end, after which its rows are asked one by one
DEATHS = 2  # of an engine that had one row alone, after which the row is failed
# Starts of an engine in a row without an answer, after which the job ends. A deadly row that is the
# only one left takes one less: it may kill its process LOST times with the batch, DEATHS times alone.
STARTS = LOST + DEATHS + 1

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core runs the model itself: one process less
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# FlashInfer compiles its sampler at the first use, and needs nvcc and a C++ compiler for that.
# Requests with a seed do not use it, nor do those that want the likeliest answer.
GPU_ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
# Compiling takes longer than a miniature run; fewer sequences, less to warm up. vLLM sets the
# random generator of a seeded request back when it prefills the prompt in chunks, and a CPU's
# generator cannot be set back: every prompt has to fit one step.
CPU_ENGINE = {
    "enforce_eager": True,
    "max_num_seqs": 64,
    "disable_log_stats": True,
    "enable_chunked_prefill": False,
}
CPU_BATCHED_TOKENS = 8192  # at least

# Columns that make up a request. Others stay away: Ray reads one named `model` as a LoRA adapter.
REQUEST = (
    "prompt",
    "multimodal_data",
    "mm_processor_kwargs",
    "multimodal_uuids",
    StatefulStageUDF.IDX_IN_BATCH_COLUMN,
)
ERROR, UNASKED = "__inference_error__", "unasked"
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*", re.MULTILINE)
NO_MESSAGE = "its process ended without a message (killed, out of memory, or a crash in native code)"


class EngineError(RuntimeError):
    """An engine that cannot run its model. The message ends with the root cause."""


class Reader(Protocol):
    """Turns answers into rows, in the actor of an engine, a whole batch at a time."""

    def read(self, asked: list[Row], answers: list[Answer], attempt: int, settled: list[Row], /) -> list[Row]:
        """Return one row for each of `asked`.

        `settled` are the rows of the same batch that earlier attempts have settled.
        """
        ...

    def settled(self, row: Row, /) -> bool:
        """Return whether a row of `read` is final. Others are asked again, with the next seed."""
        ...


def engine_config(
    recipe: Recipe, model: ModelRef, key: str, settings: Instructions | Judge, chat: bool, images: int = 0
) -> vLLMEngineProcessorConfig:
    """Return the settings of a stage's engines, for GPUs if the recipe's device says so.

    Args:
        key: of `model` in the recipe, for error messages.
        chat: whether rows hold `messages`, which the model's chat template turns into a prompt.
        images: how many images a prompt may hold.
    """
    on_cpu = not uses_gpu(recipe.device)
    engine: dict[str, Any] = {
        "dtype": model.dtype,
        "revision": model.revision,
        "max_model_len": settings.max_model_len,
        "enable_prefix_caching": True,  # prompts of one stage begin alike
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "seed": recipe.seed,
    }
    if on_cpu:
        engine |= CPU_ENGINE | {"max_num_batched_tokens": max(CPU_BATCHED_TOKENS, settings.max_model_len)}
    light: dict[str, Any] = {"enabled": True, "num_cpus": TASK_CPUS}
    multimodal: bool | dict[str, Any] = False
    if images:
        engine["limit_mm_per_prompt"] = {"image": images}
        # "openai": the model's own chat template says where its images stand.
        multimodal = light | {
            "chat_template_content_format": "openai",
            "model_config_kwargs": {"revision": model.revision},
        }
    return vLLMEngineProcessorConfig(
        model_source=locate(model.path, key),
        engine_kwargs=engine | settings.engine,
        concurrency=(settings.replicas, settings.replicas),
        batch_size=settings.batch_size,
        max_concurrent_batches=BATCHES_IN_ENGINE,
        prepare_multimodal_stage=multimodal,
        chat_template_stage=light if chat else False,
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": ENGINE_CPUS}]} if on_cpu else None,
        runtime_env={"env_vars": CPU_ENVIRONMENT if on_cpu else GPU_ENVIRONMENT},
        log_engine_metrics=False,
    )


class Engines:
    """The engines of one stage, and what they died of.

    The record is kept on the driver's node: it outlives the engines and their nodes.
    """

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # Restarted, it has forgotten, which costs a few starts; without, every later call fails.
        restarts = {"max_restarts": -1, "max_task_retries": -1}
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, **restarts}
        self.ledger = CrashLedger()
        self._causes = ray.remote(**options)(_Causes).remote()

    def answered(
        self,
        rows: Dataset,
        config: vLLMEngineProcessorConfig,
        ask: Callable[[dict[str, Any]], dict[str, Any]],
        reader: Callable[[str], Reader],
        schema: pa.Schema,
        id_column: str,
        attempts: int = 1,
    ) -> Dataset:
        """Return `rows` asked and read: one row of `schema` for each.

        Args:
            ask: row -> `sampling_params` and `prompt`, or `messages` if the config is a chat's. A
                row with a text in `__inference_error__` is not asked; its answer has that error.
            reader: device ("cuda" or "cpu") -> reader, called once in the actor of every engine.
            attempts: how often a row is asked until it is settled, each time with the next seed.
        """
        light: dict[str, Any] = {"num_cpus": TASK_CPUS}
        names = schema.names
        processor = build_processor(
            config,
            preprocess=ask,
            postprocess=lambda row: {name: row[name] for name in names},
            preprocess_map_kwargs=light,
            postprocess_map_kwargs=light,
        )
        stage = processor.get_stage_by_name("vLLMEngineStage")
        # Past pydantic: its validator has used up the placement group, and would ask for a GPU.
        object.__setattr__(stage, "fn", EngineStage)
        stage.fn_constructor_kwargs.update(engines=self, reader=reader, id_column=id_column, attempts=attempts)

        def typed(table: pa.Table) -> pa.Table:
            return table.select(names).cast(schema)

        return processor(rows).map_batches(
            typed,  # pyright: ignore[reportArgumentType]
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=TASK_CPUS,
        )

    @contextmanager
    def cause_named(self) -> Iterator[None]:
        """Raise `EngineError` with the root cause when an engine ends the block."""
        try:
            yield
        except Exception as error:
            if cause := self.causes(["job"]):
                raise EngineError(cause["job"]) from error
            raise

    def note(self, names: list[str], cause: str) -> None:
        """Record what `names` died of: ids of actors and of rows, and "job" when it is final."""
        ray.get(self._causes.note.remote(names, cause))

    def causes(self, names: list[str]) -> dict[str, str]:
        """Return the last cause of each of `names` that has one."""
        return ray.get(self._causes.read.remote(names))


class _Causes:
    def __init__(self) -> None:
        self.causes: dict[str, str] = {}

    def note(self, names: list[str], cause: str) -> None:
        self.causes.update(dict.fromkeys(names, cause))

    def read(self, names: list[str]) -> dict[str, str]:
        return {name: self.causes[name] for name in names if name in self.causes}


class EngineStage(StatefulStageUDF):
    """A vLLM engine and a reader in one actor of Ray Data, with several batches in flight.

    A batch leaves when all its rows are settled. So attempts after the first start no engines, and
    what the reader requires of a batch, such as quotas, holds for all attempts. While a thread
    reads one batch, the engine has the others.

    An engine that dies takes its actor along, and Ray restarts both. Rows that it had are asked one
    by one, with nothing else in the engine; a row that kills it DEATHS times more is failed. A
    batch that vanished with its actor, as on a lost node, is first tried again as a whole. An
    engine that dies STARTS times in a row without an answer ends the job: no row is to blame.
    """

    def __init__(
        self,
        data_column: str,
        expected_input_keys: list[str],
        engines: Engines,
        reader: Callable[[str], Reader],
        id_column: str,
        attempts: int,
        **engine: Any,
    ):
        super().__init__(data_column, expected_input_keys)
        self.engines, self.id_column, self.attempts = engines, id_column, attempts
        self.me, self.proven = str(ray.get_runtime_context().get_actor_id()), False
        self.in_engine: set[tuple[str, ...]] = set()
        self.lock, self.reading, self.dying = SharedLock(), asyncio.Lock(), asyncio.Lock()
        starts = engines.ledger.begin(["start", self.me])
        if starts >= STARTS:
            cause = engines.causes([self.me]).get(self.me, NO_MESSAGE)
            self._end_job(f"the engine died {starts} times before it answered: {cause}")
        # vLLM hands its environment to workers on other nodes, which have no such file.
        one_node = engine["engine_kwargs"]["distributed_executor_backend"] != "ray"
        self.vllm_log = log_errors_to_file() if one_node else None
        from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

        try:
            self.engine = vLLMEngineStageUDF(data_column, expected_input_keys, **engine)
            self.reader = reader("cuda" if ray.get_gpu_ids() else "cpu")
        except Exception as error:
            if self._logged():
                self._exit([])  # the memory of the engine before may not be free yet
            self._end_job(f"the engine cannot start: {root_cause(error)}", error)

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Map a batch of Ray's stages. Rows with an error, too, which would bypass the reader."""
        for row in batch[self.data_column] if isinstance(batch, dict) else ():
            row[UNASKED] = row.pop(ERROR, "")
        async for rows in super().__call__(batch):
            yield rows

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """Ask until every row of the batch is settled or has had its attempts."""
        settled: dict[int, dict[str, Any]] = {}
        for attempt in range(1, self.attempts + 1):
            left = [n for n in range(len(batch)) if n not in settled]
            asked = [batch[n] for n in left]
            answers = await self._ask([str(row[self.id_column]) for row in batch], asked, attempt)
            async with self.reading:  # tokenizers refuse two threads
                rows = await asyncio.to_thread(self.reader.read, asked, answers, attempt, list(settled.values()))
            for n, row in zip(left, rows, strict=True):
                if attempt == self.attempts or batch[n][UNASKED] or self.reader.settled(row):
                    settled[n] = row
            if len(settled) == len(batch):
                break
        for n, row in settled.items():
            yield row | {self.IDX_IN_BATCH_COLUMN: batch[n][self.IDX_IN_BATCH_COLUMN]}
        if not self.engine.engine_kwargs.get("disable_log_stats"):
            await self.engine.llm.engine.do_log_stats()

    async def _ask(self, ids: list[str], rows: list[dict[str, Any]], attempt: int) -> list[Answer]:
        """Return the answers to `rows`, those rows of the batch `ids` that are not settled yet."""
        batch = (*ids, f"attempt {attempt}")
        async with self.lock.shared():
            lost = await self._begin(batch)
            if lost < LOST:
                self.in_engine.add(batch)
                answers = list(await asyncio.gather(*(self._generate(row, attempt) for row in rows)))
                self.in_engine.remove(batch)
        if lost >= LOST:
            answers = await self._one_by_one(rows, attempt)
        self.engines.ledger.end(batch)
        return answers

    async def _one_by_one(self, rows: list[dict[str, Any]], attempt: int) -> list[Answer]:
        """Return the answers to rows of which one may have killed an engine.

        Those that have killed it alone come last, so that the others are answered first.
        """
        ids = [str(row[self.id_column]) for row in rows]
        causes = await asyncio.to_thread(self.engines.causes, ids)
        answers: dict[int, Answer] = {}
        for n in sorted(range(len(rows)), key=lambda n: ids[n] in causes):
            async with self.lock.exclusive():
                alone = (ids[n], "alone")
                if await self._begin(alone) >= DEATHS:
                    why = causes.get(ids[n], NO_MESSAGE)
                    answers[n] = Answer(error=f"killed the engine {DEATHS + 1} times: {why}")
                    continue
                answers[n] = await self._generate(rows[n], attempt, alone=True)
                self.engines.ledger.end(alone)
        return [answers[n] for n in range(len(rows))]

    async def _generate(self, row: dict[str, Any], attempt: int, alone: bool = False) -> Answer:
        """Return the answer to one row, with an error if vLLM refuses it or fails for it alone."""
        from ray.llm._internal.common.errors import VLLM_FATAL_ERRORS

        if row[UNASKED]:
            return Answer(error=row[UNASKED])
        sampling = dict(row["sampling_params"])
        if "seed" in sampling:
            sampling["seed"] = (int(sampling["seed"]) + attempt - 1) % 2**31
        limit = int(sampling["max_tokens"])
        request = {name: row[name] for name in REQUEST if name in row} | {"sampling_params": sampling}
        try:
            _, output, _ = await self.engine.llm.generate_async(request)
        except VLLM_FATAL_ERRORS:
            async with self.dying:  # all rows in flight come here; the first ends the process
                await asyncio.to_thread(self._exit, [str(row[self.id_column])] if alone else [])
            raise
        except Exception as error:
            return Answer(error=root_cause(error))
        if not self.proven:
            self.proven = True
            self.engines.ledger.end(["start", self.me])
        return Answer(output["generated_text"], cut=output["num_generated_tokens"] >= limit)

    async def _begin(self, what: tuple[str, ...]) -> int:
        return await asyncio.to_thread(self.engines.ledger.begin, what)

    def _exit(self, suspects: list[str]) -> None:
        """Record what the engine died of, and exit: Ray restarts the actor.

        `ray.actor.exit_actor` would be final.
        """
        cause = self._logged() or NO_MESSAGE
        for batch in self.in_engine:
            self.engines.ledger.begin(batch)  # once more: it did not just vanish with its node
        self.engines.note([self.me, *suspects], cause)
        log.error("a vLLM engine died: %s", cause)
        os._exit(1)

    def _logged(self) -> str:
        return last_exception(self.vllm_log.read_text()) if self.vllm_log else ""

    def _end_job(self, cause: str, error: Exception | None = None) -> None:
        """Raise: Ray Data does not start an actor again whose constructor raises."""
        self.engines.note(["job"], cause)
        raise EngineError(cause) from error


class SharedLock:
    """A fair asyncio lock that many tasks share or one task holds alone."""

    def __init__(self) -> None:
        self._turn, self._free, self._inside = asyncio.Lock(), asyncio.Event(), 0
        self._free.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._turn:
            self._inside += 1
            self._free.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._free.set()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        async with self._turn:
            await self._free.wait()
            yield


def log_errors_to_file() -> Path:
    """Return the file to which vLLM writes its errors, in this process and in those it starts.

    The core of an engine is a process of its own: its exceptions reach the log and nothing else.
    """
    folder = Path(tempfile.mkdtemp(prefix="vllm_"))
    errors, level = folder / "errors.log", os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
    errors.touch()
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(levelname)s %(asctime)s %(name)s: %(message)s"}},
        "handlers": {
            "console": {"class": "logging.StreamHandler", "formatter": "line", "level": level},
            "errors": {"class": "logging.FileHandler", "level": "ERROR", "filename": str(errors)},
        },
        "loggers": {"vllm": {"handlers": ["console", "errors"], "level": level, "propagate": False}},
    }
    (folder / "logging.json").write_text(json.dumps(config))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
    return errors


def last_exception(text: str) -> str:
    """Return the last line of vLLM's log that names an exception, or "".

    `EngineDeadError` only points to the exception before it.
    """
    lines = [line for line in EXCEPTION.findall(text) if "EngineDeadError" not in line]
    return lines[-1] if lines else ""


def root_cause(error: BaseException) -> str:
    """Return type and message of the exception that started the chain of `error`."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
