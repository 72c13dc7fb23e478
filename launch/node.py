"""The checks that a node can do by itself before a job: GPUs, documents, model, disks and memory."""

import csv
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from launch.check_results import MAY_PASS, PASSED, WILL_NOT_PASS, Finding
from launch.cluster import USABLE, Cluster
from launch.planning import Plan
from launch.proposal import loop_note
from train.checkpoints.layout import Range
from train.checkpoints.reader import Checkpoint
from train.checkpoints.resume import saved_shape
from train.checkpoints.streaming import READERS
from train.claims.claim import read_claims
from train.config.provenance import git_revision
from train.config.provenance import versions as package_versions
from train.config.settings import Settings
from train.data.documents import Document, read_documents
from train.data.template import template_time
from train.data.tokenizer import load_tokenizer
from train.data.tokens import tokenize_document
from train.model.text_model import text_config
from train.runtime.errors import UserError
from train.runtime.gpu import KERNELS, capability, check_kernels, grouped_products, installed
from train.runtime.shown import size_shown
from train.training.early import check_early

SAMPLE, PIECE = 2**28, 2**24  # bytes read to measure a disk's speed: in all, and of one tensor
BUSY = 0.05  # share of a GPU's memory: if more is used, it is not only by the driver itself


# Versions


def versions() -> Finding:
    """Returns the versions of packages, CUDA, NCCL and this repository, which must be equal on all nodes."""
    found = {"python": sys.version.split()[0]} | package_versions()
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    found["revision"] = (git_revision() or "none")[:12]
    return Finding("versions", PASSED, f"torch {found['torch']}, deepspeed {found['deepspeed']}", found)


# GPUs


def gpus() -> Finding:
    """Checks that the GPUs are there, as many as Slurm has allocated, idle, of one kind and healthy. Raises
    RuntimeError if nvidia-smi is missing or fails."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if shutil.which("nvidia-smi") is None:
        if torch.cuda.is_available() or given != "0":
            raise RuntimeError("there should be GPUs, but there is no nvidia-smi. Is the driver installed?")
        return Finding("GPUs", PASSED, "no GPU: gloo", {})
    rows = _nvidia_smi(
        "--query-gpu=uuid,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    )
    remapped = _nvidia_smi("--query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure")
    processes = _nvidia_smi("--query-compute-apps=gpu_uuid,pid")
    count = torch.cuda.device_count()  # after nvidia-smi, as this may start to use the first GPU
    visible = {f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)}
    return judge_gpus(rows, remapped, processes, visible, int(given) or count)


def _nvidia_smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi fails ({(done.stdout + done.stderr).strip()}). Is the driver loaded?")
    return [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]


def judge_gpus(
    rows: list[list[str]], remapped: list[list[str]], processes: list[list[str]], visible: set[str], expected: int
) -> Finding:
    """Returns the finding on the GPUs, from the output of nvidia-smi.

    rows: uuid, name, driver, MiB in all, MiB used, uncorrected ECC errors. remapped: uuid, pending, failure. processes:
    uuid, pid. visible: the uuids of the GPUs that torch sees; others belong to other jobs. expected: how many there
    must be.
    """
    rows = [row for row in rows if row[0] in visible]
    bad, noted = [], []
    if len(visible) != expected or len(rows) != expected or not rows:
        bad.append(f"{expected} GPUs are expected, torch sees {len(visible)} and nvidia-smi {len(rows)} of them")
    if len(kinds := {(row[1], row[3]) for row in rows}) > 1:
        bad.append(f"GPUs of several kinds: {', '.join(sorted(f'{name} {size} MiB' for name, size in kinds))}")
    for index, (uuid, _, _, total, used, errors) in enumerate(rows):
        if errors.isdecimal() and int(errors):
            noted.append(f"GPU {index} ({uuid}) has had {errors} uncorrected ECC errors since the driver was loaded")
        if any(row[0] == uuid and {"Yes", "1"} & {*row[1:]} for row in remapped):
            bad.append(f"GPU {index} ({uuid}) has rows of memory to be remapped: reset or replace it")
        pids = [pid for owner, pid in processes if owner == uuid]
        if pids or float(used) > BUSY * float(total):
            by = f" by process {', '.join(pids)}" if pids else ""
            bad.append(f"GPU {index} ({uuid}) is in use{by}: {used} of {total} MiB")
    if bad:  # another node may be fine, or this one after a reset
        return Finding("GPUs", MAY_PASS, "; ".join([*bad, *noted]))
    text = "; ".join([f"{len(rows)} × {rows[0][1]}, {rows[0][3]} MiB, idle, driver {rows[0][2]}", *noted])
    return Finding("GPUs", PASSED, text, {"GPUs": len(rows), "kind": rows[0][1], "MiB": rows[0][3]})


# Documents, model, disks and memory, compared with what the job's ranks on this node read and hold


def documents(settings: Settings) -> tuple[Finding, int]:
    """Reads --data as this node sees it. Returns the finding, and about how many tokens the longest document has: the
    one with the most characters, cut to --max-tokens. Raises UserError if a document or the tokenizer cannot be
    read."""
    counts, longest = {}, []
    for path in (source.path for source in settings.sources()):
        found = read_documents(path, settings.marker, settings.bad_rows)
        counts[f"documents in {path}"] = len(found)
        longest.append(max(found, key=_characters))
    document = max(longest, key=_characters)
    tokenizer = load_tokenizer(settings.model, template_time(settings.template_time))
    tokenized = tokenize_document(document, tokenizer, add_bos=settings.bos, add_eos=settings.eos)
    tokens = min(len(tokenized.ids_L), settings.max_tokens)
    text = f"{sum(counts.values()):,}, the longest takes {tokens:,} tokens ({document.where})"
    return Finding("documents", PASSED, text, counts), tokens


def checked_settings(settings: Settings) -> Finding:
    """Runs those checks of train/sft.py that need neither the documents of --data nor the model. Raises UserError for a
    setting that is wrong."""
    check_early(settings)
    if settings.claims:
        read_claims(settings.claims)
    if settings.held_out:
        read_documents(settings.held_out)
    return Finding("settings", PASSED, f"--mask {settings.mask}")


def _characters(document: Document) -> int:
    messages = document.messages or ()
    return len(document.text or "") + sum(len(f"{m.content}{m.reasoning}{m.tool_calls or ''}") for m in messages)


@dataclass
class Share:
    """This node's part of a job: its ranks, out of `of` ranks."""

    ranks: range
    of: int
    plan: Plan
    gpu_bytes: int = 0  # per GPU, by the plan; 0: not planned
    host_bytes: int = 0  # of this node, by the plan; 0: not planned

    def reads(self, rank: int) -> Iterator[Range]:
        """Yields what a rank reads of the checkpoint."""
        self.plan.group.rank = rank % self.plan.group.size
        yield from self.plan.load.reads(rank, self.of, self.plan.settings.method)

    def bytes_read(self) -> int:
        """Returns the bytes that this node's ranks read of the checkpoint together."""
        size = self.plan.checkpoint.bytes_of
        return sum(size(read.name, read.count) for rank in self.ranks for read in self.reads(rank))


def model(settings: Settings, ranks: range, of: int, tokens: int) -> tuple[Finding, Share]:
    """Opens --model as this node sees it, and checks by config.json and the headers of all files that it is complete.

    ranks: of this node, out of `of` ranks. tokens: of the longest document, for the plan. Returns the finding and this
    node's share of the job. Raises UserError if files are missing or wrong, or the model cannot be trained.
    """
    checkpoint = Checkpoint(settings.model)
    kinds = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    memory = min((kind.total_memory for kind in kinds), default=0) / 1e9
    cluster = Cluster(nodes=of // len(ranks), gpus=len(ranks), memory=memory, kind=kinds[0].name if kinds else "")
    plan = Plan(settings, checkpoint, cluster, tokens)
    files = {info.file for info in checkpoint.tensors.values()}
    size = sum(file.stat().st_size for file in files)
    told = f"{len(files)} files, {size_shown(size)}, {len(checkpoint.tensors):,} tensors, all headers read"
    finding = Finding("model", PASSED, told, {"model (a sample of its bytes)": checkpoint.fingerprint()[:12]})
    return finding, Share(ranks, of, plan)


def kernels(share: Share) -> Finding:
    """Checks that the packages of the GPU kernels that this model needs are installed. Raises UserError if not."""
    check_kernels(text_config(share.plan.checkpoint))
    found = installed(("torch", *KERNELS)) if capability() else {}
    return Finding("kernels", PASSED, ", ".join(" ".join(each) for each in found.items()) or "no GPU: none are needed")


def disk_speed(share: Share) -> Finding:
    """Reads a sample of what this node's ranks read of the model, and estimates how long all of it would take."""
    checkpoint, chosen, total = share.plan.checkpoint, [], 0
    for read in share.reads(share.ranks[0]):
        count = min(read.count, PIECE // checkpoint.tensors[read.name].dtype.itemsize)
        chosen.append(Range(read.name, read.start, count))
        total += checkpoint.bytes_of(read.name, count)
        if total >= SAMPLE:
            break
    for read in chosen:  # drops the page cache, so that the sample comes from the disk
        info = checkpoint.tensors[read.name]
        with info.file.open("rb") as file:
            start = info.offset + read.start * info.dtype.itemsize
            os.posix_fadvise(file.fileno(), start, read.count * info.dtype.itemsize, os.POSIX_FADV_DONTNEED)

    def fetch(read: Range) -> None:
        checkpoint.read(read.name, read.start, torch.empty(read.count, dtype=checkpoint.tensors[read.name].dtype))

    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(fetch, chosen))
    speed, whole = total / (time.perf_counter() - started), share.bytes_read()
    checkpoint.close()
    measured = f"{size_shown(speed)}/s ({size_shown(total)} read)"
    text = f"{measured}; {size_shown(whole)} would take {whole / speed:.0f} s"
    return Finding("disk speed", PASSED, text)


def plan(share: Share) -> Finding:
    """Returns what the job needs of this node by launch.plan, if all documents are as long as the longest one.
    Sets the bytes of the share. Raises UserError for settings that are wrong; a model that cannot be planned passes."""
    plan = share.plan
    try:
        share.gpu_bytes, share.host_bytes = plan.gpu_bytes["total"], plan.host_bytes
    except UserError:
        raise
    except Exception as error:  # a model that cannot be planned may still be trained
        return Finding("plan", PASSED, f"none ({type(error).__name__}: {error}): memory is not checked")
    gpu = f"{size_shown(share.gpu_bytes)} of each GPU, " if plan.cluster.memory else ""
    found = capability()
    loop = f"; {loop_note(plan)}" if found and not grouped_products(found) else ""
    return Finding(
        "plan", PASSED, f"{gpu}{size_shown(share.host_bytes)} of host memory, by python -m launch.plan{loop}"
    )


def gpu_memory(share: Share) -> Finding:
    """Compares the smallest GPU of this node with the plan."""
    need, have = share.gpu_bytes, share.plan.cluster.memory * 1e9
    text = f"{size_shown(have)} per GPU, {size_shown(need)} needed"
    if need > have:
        return Finding("GPU memory", WILL_NOT_PASS, f"{text}. python -m launch.plan proposes what to change.")
    return Finding("GPU memory", PASSED, text + (": little memory is left" if need > USABLE * have else ""))


def host_memory(share: Share) -> Finding:
    """Compares the memory of this node with the plan."""
    return judge_memory(share.host_bytes, *node_memory())


def judge_memory(need: int, total: int, free: int) -> Finding:
    """Returns the finding on the memory of a node: `need` bytes of `total`, of which `free` are not in use."""
    text = f"{size_shown(free)} of {size_shown(total)} free, {size_shown(need)} needed"
    if need > total:
        return Finding("host memory", WILL_NOT_PASS, f"{text}. Use more nodes, or request more memory (sbatch --mem).")
    if need > free:
        return Finding("host memory", MAY_PASS, f"{text}. Which other process uses it?")
    return Finding("host memory", PASSED, text)


def node_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Returns the bytes of memory that this process can have, of its node or of its control groups: (total, free).
    Cached files count as free, since the kernel can drop them (memory.stat and the names of the files: Linux,
    admin-guide/cgroup-v2 and cgroup-v1/memory). root: where /proc and /sys are."""
    node, own = psutil.virtual_memory(), root / "proc/self/cgroup"
    total, free = node.total, node.available
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used, prefix = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            if controllers
            else ("memory.max", "memory.current", "")
        )
        group = mount / path.lstrip("/")
        for level in (group, *group.parents):
            if not level.is_relative_to(mount) or not (level / limit).exists():
                continue
            if (given := (level / limit).read_text().strip()) == "max":
                continue
            stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            total = min(total, int(given))
            free = min(free, int(given) - int((level / used).read_text()) + files)
    return total, max(0, free)


def disk_space(share: Share) -> Finding:
    """Compares the free space at --output with what the run writes: its training checkpoints, one more than are kept,
    and its result. Existing checkpoints of a resumed run count as free space, because new ones replace
    them."""
    settings, plan = share.plan.settings, share.plan
    output = Path(settings.output or "runs").absolute()
    place = next(path for path in (output, *output.parents) if path.exists())
    trained = sum(
        math.prod(saved_shape(plan.model, name, tuple(p.shape)))
        for name, p in plan.model.named_parameters()
        if p.requires_grad
    )
    left = trained * (plan.load.dtype.itemsize if settings.method == "full" else 4)
    need = trained * 4 * 3 * (settings.keep + 1) + left  # bytes; weights in fp32 and AdamW's two moments
    text = f"{size_shown(need)} needed for {settings.keep + 1} training checkpoints and the result"
    if there := sum(file.stat().st_size for file in (output / "saves").glob("*/*")):
        need, text = max(0, need - there), f"{text}, of which {size_shown(there)} exist already"
    free = shutil.disk_usage(place).free
    text = f"{size_shown(free)} free at {place}, {text}"
    if need > free:
        return Finding("disk space", WILL_NOT_PASS, f"{text}. Give another --output, or a smaller --keep.")
    return Finding("disk space", PASSED, text)
