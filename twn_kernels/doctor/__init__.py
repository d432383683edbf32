"""Checks each op on this machine, in every implementation and dtype that runs here, against fp64 truth.

The truth is written here in plain PyTorch with autograd and shares nothing with any implementation; the tolerance is
the test suite's one oracle. Owns the checks and their fixes; printing and exit codes belong to the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from twn_kernels import env
from twn_kernels.doctor import group
from twn_kernels.doctor.check import (
    DTYPES,
    FAIL,
    NOT_AVAILABLE,
    OK,
    Check,
    check_name,
    compare,
    first_line,
    fix,
)
from twn_kernels.errors import ImplUnavailable, OptionError, TableError, did_you_mean, quoted
from twn_kernels.impl.cuda import loader
from twn_kernels.ops import (
    LoRA,
    RoutePlan,
    choice,
    choice_table,
    dual_lora_linear,
    dual_lora_linear_fanout,
    gate_scores,
    pool_queries,
)
from twn_kernels.settings import ENV_IMPL, IMPLS, impl_override

__all__ = ["Check", "examine", "render"]

# Tails in every dimension, unequal ranks, all four routes: what a wrong mask or stride would show in.
TOKENS, IN_FEATURES, OUT_FEATURES, RANKS, SCALINGS = 37, 96, 81, (16, 5), (0.5, -1.75)


def examine(device: torch.device | str | None = None) -> Iterator[Check]:
    """Run every check, one at a time, so that a caller can print each as it comes.

    Args:
        device: where to check the ops; None: the first GPU where torch sees one, else the CPU.

    Yields:
        :class:`Check` in a fixed order: the installation, then each op by implementation and dtype.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    yield from _installation(device)
    for impl in sorted(set(IMPLS) - {"auto"}, key=lambda name: (name != "reference", name)):
        reason = choice.unavailable_reason(impl, device, may_build=False)  # a report builds nothing
        if reason is not None:
            detail = f"{' '.join(reason.split())} Instead, {_instead(device)}"
            yield Check(f"{impl} on {device.type}", NOT_AVAILABLE, detail)
            continue
        for dtype in DTYPES:
            reason = _refusal(impl, dtype, device)
            if reason is not None:
                yield Check(f"{impl}, {dtype}, {device.type}", NOT_AVAILABLE, " ".join(reason.split()))
                continue
            check = _inference if choice.is_for_inference(impl) else _dual_lora
            yield from check(impl, dtype, device)
            yield from group.checks(impl, dtype, device)
    for impl in ("reference", "cuda"):
        if choice.unavailable_reason(impl, device, may_build=False) is None:
            yield from _small_ops(impl, device)


def render(checks: list[Check]) -> str:
    """The last line of the report: how many of each."""
    counts = {status: sum(check.status == status for check in checks) for status in (OK, FAIL, NOT_AVAILABLE)}
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _installation(device: torch.device) -> Iterator[Check]:
    gpus = env.collect_gpus()
    if isinstance(gpus, list) and gpus and not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        detail = f"the driver lists {gpus[0]['name']}, but torch {torch.__version__} {built} and sees none"
        yield Check("GPU", FAIL, detail, "install a CUDA build of torch that the driver supports, or a newer driver")
    elif device.type == "cuda":
        yield Check("GPU", OK, torch.cuda.get_device_name(device))
    else:
        yield Check("GPU", NOT_AVAILABLE, "the driver lists none; the GPU checks did not run")
    yield _extension(device)
    yield from _override(device)
    yield _choice_table(device)


def _choice_table(device: torch.device) -> Check:
    """Whether the table that ``auto`` follows can be read, and what it says for this device."""
    title = "measurements that auto follows"
    try:
        rows = choice_table.packaged()
    except TableError as error:
        return Check(title, FAIL, " ".join(str(error).split()), "reinstall twn_kernels")
    here = sum(row.arch == choice.arch(device) for row in rows) if device.type == "cuda" else 0
    return Check(title, OK, f"{len(rows)} rows, {here} of them for this device; {_instead(device)}")


def _instead(device: torch.device) -> str:
    """What ``auto`` takes here for a 16-bit layer (fp32 on a CPU), or why it takes nothing."""
    try:
        taken = choice.chosen("auto", device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OptionError, ImplUnavailable, TableError) as error:
        return f'impl="auto" fails: {" ".join(str(error).split())}'
    return f'impl="auto" takes {taken.impl}: {taken.reason}'


def _override(device: torch.device) -> Iterator[Check]:
    name = impl_override()
    if name is None:
        return
    title = f"{ENV_IMPL}={name}"
    if name in IMPLS:
        reason = None if name == "auto" else choice.unavailable_reason(name, device)
        if reason is None:
            yield Check(title, OK, "every call that leaves the choice open asks for it")
        else:
            yield Check(title, FAIL, f"it cannot run on {device.type}: {' '.join(reason.split())}", f"unset {ENV_IMPL}")
        return
    detail = f"there is no such implementation; every call that leaves the choice open fails. There are {quoted(IMPLS)}"
    yield Check(title, FAIL, detail, f"unset {ENV_IMPL}, or set it to one of these.{did_you_mean(name, IMPLS)}")


def _extension(device: torch.device) -> Check:
    info = loader.build_info()
    if not info.built:
        return Check("CUDA extension", NOT_AVAILABLE, f"{info}; rebuild: {loader.REBUILD}")
    try:
        loader.load()
        if device.type == "cuda":
            x = torch.arange(1001, device=device, dtype=torch.float32)
            if not torch.equal(loader.probe(x), x):
                return Check("CUDA extension", FAIL, "its copy kernel returned other values", loader.REBUILD)
    except ImplUnavailable as error:
        return Check("CUDA extension", FAIL, str(error).splitlines()[0], loader.REBUILD)
    except RuntimeError as error:
        return Check("CUDA extension", FAIL, first_line(error), f"{loader.REBUILD}")
    return Check("CUDA extension", OK, f"{info}, loads{' and launches' if device.type == 'cuda' else ''}")


def _refusal(impl: str, dtype: str, device: torch.device) -> str | None:
    """Why ``impl`` does not take layers and adapters of such dtypes."""
    inputs = _inputs(*DTYPES[dtype], device)
    layers = [[inputs["weight"]], *([side] for name in ("reasoning", "embedding") for side in inputs[name][:2])]
    reason = choice.unavailable_reason(impl, device, inputs["x"].dtype)
    return choice.refusal_of(impl, inputs["x"], layers) if reason is None else reason


def _inference(impl: str, dtype: str, device: torch.device) -> Iterator[Check]:
    """The one op that an implementation without a backward pass has of the three."""
    inputs, op = _inputs(*DTYPES[dtype], device), "dual_lora_linear"
    title = check_name(op, "forward", impl, dtype, device)
    with torch.no_grad():
        truth, own = ({"y0": _in_torch(of, False)[0]} for of in (_cast(inputs, torch.float64), inputs))
        try:
            got = {"y0": _in_package(inputs, False, impl)[0]}
        except Exception as error:  # the finding itself, as below
            yield Check(title, FAIL, first_line(error), fix(impl, error))
        else:
            yield compare(title, impl, ["y0"], got, truth, own)
    detail = f"{impl} is for inference, and routes each token to one result"
    for name in (f"{op} backward", f"{op}_fanout"):
        yield Check(f"{name}, {impl}, {dtype}, {device.type}", NOT_AVAILABLE, detail)


def _dual_lora(impl: str, dtype: str, device: torch.device) -> Iterator[Check]:
    inputs = _inputs(*DTYPES[dtype], device)
    for op, fanout in (("dual_lora_linear", False), ("dual_lora_linear_fanout", True)):
        truth = _results(_in_torch, _cast(inputs, torch.float64), fanout)
        own = _results(_in_torch, inputs, fanout)

        def actual(inputs, fanout, impl=impl):
            return _in_package(inputs, fanout, impl)

        try:
            got = _results(actual, inputs, fanout)
        except Exception as error:  # whatever breaks is the finding; the remaining checks must still run
            for part in ("forward", "backward"):
                yield Check(check_name(op, part, impl, dtype, device), FAIL, first_line(error), fix(impl, error))
            continue
        for part in ("forward", "backward"):
            names = [name for name in truth if name.startswith("d(") == (part == "backward")]
            yield compare(check_name(op, part, impl, dtype, device), impl, names, got, truth, own)


def _small_ops(impl: str, device: torch.device) -> Iterator[Check]:
    """The ops that compute in fp32 whatever dtype they are given: plain PyTorch, or one launch of the extension."""
    for dtype in ("fp32", "fp16", "bf16"):
        for op, (ours, in_torch, shapes) in _SMALL.items():
            generator = torch.Generator().manual_seed(0)
            draws = [torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes]
            inputs = [draw.to(device, DTYPES[dtype][0]) for draw in draws]
            title = check_name(op, "forward", impl, dtype, device)
            try:
                got = ours(*inputs, impl=impl)
            except Exception as error:  # the finding itself, as above
                yield Check(title, FAIL, first_line(error), fix(impl, error))
                continue
            truth, own = (in_torch(*(t.to(wide) for t in inputs)) for wide in (torch.float64, torch.float32))
            yield compare(title, impl, [op], {op: got}, {op: truth}, {op: own})


def _gate(features: Tensor, weight: Tensor, bias: Tensor, head: Tensor, *, impl: str) -> Tensor:
    return gate_scores(features, [(weight, bias), (head, None)], impl=impl)


def _gate_in_torch(features: Tensor, weight: Tensor, bias: Tensor, head: Tensor) -> Tensor:
    functional = torch.nn.functional
    return functional.linear(functional.gelu(functional.linear(features, weight, bias)), head).sigmoid()[:, 0]


def _pool_in_torch(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states.mean(1), dim=-1)


# Name: the op, the same in PyTorch, and the shapes of both functions' arguments.
_SMALL = {
    "gate_scores": (_gate, _gate_in_torch, ((37, 96), (81, 96), (81,), (1, 81))),
    "pool_queries": (pool_queries, _pool_in_torch, ((37, 5, 96),)),
}


def _inputs(dtype: torch.dtype, adapter_dtype: torch.dtype, device: torch.device) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    narrow = IN_FEATURES**-0.5
    loras = []
    for rank, scaling in zip(RANKS, SCALINGS, strict=True):
        A = draw(rank, IN_FEATURES, scale=narrow, dtype=adapter_dtype)
        loras.append(LoRA(A, draw(OUT_FEATURES, rank, dtype=adapter_dtype), scaling))
    return {
        "x": draw(TOKENS, IN_FEATURES),
        "weight": draw(OUT_FEATURES, IN_FEATURES, scale=narrow),
        "bias": draw(OUT_FEATURES),
        "reasoning": loras[0],
        "embedding": loras[1],
        "routes": (torch.arange(TOKENS) % 4).to(device, torch.int8),
        "pulls": [draw(TOKENS, OUT_FEATURES), draw(TOKENS, OUT_FEATURES)],
    }


def _cast(inputs: dict, dtype: torch.dtype) -> dict:
    def cast(value):
        if isinstance(value, LoRA):
            return LoRA(value.A.to(dtype), value.B.to(dtype), value.scaling)
        if isinstance(value, list):
            return [cast(entry) for entry in value]
        return value.to(dtype) if value.is_floating_point() else value

    return {name: cast(value) for name, value in inputs.items()}


def _results(function: Callable, inputs: dict, fanout: bool) -> dict[str, Tensor]:
    """Outputs and gradients by name; gradients are called ``d(name)``."""
    leaves = {"x": inputs["x"], "bias": inputs["bias"]}
    for name in ("reasoning", "embedding"):
        leaves |= {f"{name}.A": inputs[name].A, f"{name}.B": inputs[name].B}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    loras = {n: LoRA(leaves[f"{n}.A"], leaves[f"{n}.B"], inputs[n].scaling) for n in ("reasoning", "embedding")}
    outputs = function({**inputs, **loras, "x": leaves["x"], "bias": leaves["bias"]}, fanout)
    torch.autograd.backward(outputs, inputs["pulls"][: len(outputs)])
    gradients = {f"d({name})": leaf.grad for name, leaf in leaves.items()}
    return {f"y{index}": y.detach() for index, y in enumerate(outputs)} | gradients


def _in_package(inputs: dict, fanout: bool, impl: str) -> list[Tensor]:
    names = ("x", "weight", "bias", "reasoning", "embedding")
    plan = RoutePlan.from_routes(inputs["routes"])
    op = dual_lora_linear_fanout if fanout else dual_lora_linear
    out = op(*(inputs[name] for name in names), plan, impl=impl)
    return list(out) if fanout else [out]


def _in_torch(inputs: dict, fanout: bool) -> list[Tensor]:
    base = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    terms = []
    for bit, name in ((1, "reasoning"), (2, "embedding")):
        lora = inputs[name]
        narrow = torch.nn.functional.linear(inputs["x"].to(lora.A.dtype), lora.A)
        delta = torch.nn.functional.linear(narrow, lora.B) * lora.scaling
        terms.append(torch.where(((inputs["routes"] & bit) != 0)[:, None], delta, 0.0))
    outputs = [base + terms[0], base + terms[1]] if fanout else [base + terms[0] + terms[1]]
    return [y.to(base.dtype) for y in outputs]
