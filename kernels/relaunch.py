"""Repeats a launch of Triton's JIT without the JIT.

A kernel is compiled for the types of its arguments, for constants, and for which addresses are
multiples of 16. A plan holds the kernel of one such set, so that launching again takes nothing but
addresses. The JIT takes 50 us to find the kernel that so many arguments call for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The versions of Triton whose compiled kernels are launched as Plan.again does.
KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
if KNOWN:
    from triton import knobs

RUN = JITFunction.run
CONSTANTS = (int, float, str, type(None), triton.language.constexpr)  # a bool is an int
ALIGNMENT = 16
MOST = 8  # plans of one key, which differ in alignment and in the tensors that are None

INPUTS = "inputs"  # the parameter that takes a NamedTuple of tensors
NONE: Mapping[str, Any] = {}
Tensors = Sequence[torch.Tensor | None]

Plans = dict[Any, list["Plan"]]


class Plan:
    """A launch of one kernel that was made, and the places of tensors among its arguments."""

    def __init__(
        self,
        kernel: Any,
        compiled: Any,
        programs: int,
        inputs: Tensors,
        given: dict[str, Any],
        fixed: dict[str, Any],
        config: Any,
        descriptors: Mapping[str, Any],
    ) -> None:
        parameters = kernel.signature.parameters
        defaults = {name: x.default for name, x in parameters.items()}
        values: dict[str, Any] = {**defaults, **fixed, **given}
        values |= dict.fromkeys((*descriptors, INPUTS))
        tensors = [name for name, x in given.items() if isinstance(x, torch.Tensor)]
        place = {name: at for at, name in enumerate(parameters)}
        self.programs, self.driver = programs, driver.active
        self.kernel, self.config = kernel, config  # kept alive, so that their ids stay theirs
        self.device = self.driver.get_current_device()
        self.arguments: list[Any] = [
            None if name in tensors else bare(values[name]) for name in parameters
        ]
        self.inputs = place.get(INPUTS)
        self.known = [at for at, x in enumerate(inputs) if x is not None]
        self.addresses: list[int | None] = [None for _ in inputs]
        self.names = list(given)
        self.constants = [None if name in tensors else x for name, x in given.items()]
        # (index in given, place, type, device)
        self.given = [
            (at, place[name], x.dtype, x.get_device())
            for at, (name, x) in enumerate(given.items())
            if name in tensors
        ]
        self.descriptors = [place[name] for name in descriptors]
        every = [*(x for x in inputs if x is not None), *(given[name] for name in tensors)]
        self.aligned = [x.data_ptr() % ALIGNMENT == 0 for x in every]
        self.all_aligned = all(self.aligned)
        self.run, self.function = compiled.run, compiled.function
        self.metadata = compiled.packed_metadata

    def again(
        self,
        inputs: Tensors,
        given: Mapping[str, Any],
        descriptors: Mapping[str, Any] = NONE,
    ) -> bool:
        """Launches with these tensors; returns false, and launches nothing, if that takes another
        kernel.
        """
        if self.driver is not driver.active or list(given) != self.names or watched(self.kernel):
            return False
        values = list(given.values())
        arguments, addresses, bits = self.arguments.copy(), self.addresses.copy(), 0
        for at in self.known:
            addresses[at] = address = inputs[at].data_ptr()  # type: ignore[union-attr]
            bits |= address
        for at, place, dtype, device in self.given:
            x = values[at]
            if x is None or x.dtype is not dtype or x.get_device() != device:
                return False
            arguments[place] = address = x.data_ptr()
            bits |= address
            values[at] = None
        if values != self.constants:
            return False
        if bits % ALIGNMENT == 0:
            if not self.all_aligned:
                return False
        else:
            every = [addresses[at] for at in self.known]
            every += [arguments[place] for _, place, _, _ in self.given]
            if [x % ALIGNMENT == 0 for x in every] != self.aligned:  # type: ignore[operator]
                return False
        if self.inputs is not None:
            arguments[self.inputs] = tuple(addresses)
        for place, x in zip(self.descriptors, descriptors.values(), strict=True):
            arguments[place] = x
        stream = self.driver.get_current_stream(self.device)
        # Addresses instead of tensors: the launcher asks the driver about each tensor.
        self.run(
            self.programs, 1, 1, stream, self.function, self.metadata, None, None, None, *arguments
        )
        return True


def bare(x: Any) -> Any:
    """Returns x with a tuple for each NamedTuple, of which Triton's launcher would make a list."""
    return tuple(map(bare, x)) if isinstance(x, tuple) else x


def watched(kernel: Any) -> bool:
    """Returns whether the JIT is replaced or has hooks, so that a launch has to come through it."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(kernel.run, "__func__", None) is not RUN
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


def launch(
    kernel: Any,
    programs: int,
    inputs: Tensors,
    given: dict[str, Any],
    fixed: dict[str, Any],
    config: Any = None,
    descriptors: Mapping[str, Any] = NONE,
) -> Plan | None:
    """Launches through the JIT on the current device; returns a Plan to repeat that, or None.

    inputs: the NamedTuple for the parameter of that name, empty where the kernel has none. given:
    keywords of tensors and constants. fixed: keywords that are the same whenever the plan is used.
    config: an object whose id says so. descriptors: keywords of the copy engine's descriptors,
    which differ in their addresses alone whenever the plan is used.
    """
    direct = KNOWN and isinstance(kernel, JITFunction) and not watched(kernel)
    first = {INPUTS: inputs} if inputs else {}
    compiled = kernel[(programs,)](**fixed, **first, **given, **descriptors)
    if not direct or compiled is None or driver.active.get_current_target().backend != "cuda":
        return None
    if not all(isinstance(x, torch.Tensor) or is_constant(x) for x in given.values()):
        return None
    return Plan(kernel, compiled, programs, inputs, given, fixed, config, descriptors)


def is_constant(x: Any) -> bool:
    """Returns whether x, or all that a tuple x holds, is the same argument wherever it is equal."""
    return all(map(is_constant, x)) if isinstance(x, tuple) else isinstance(x, CONSTANTS)


def keep(plans: Plans, key: Any, plan: Plan | None) -> None:
    """Adds a plan to those of a key; drops the oldest, and those of other drivers."""
    if plan is not None:
        others = [x for x in plans.get(key, ()) if x.driver is plan.driver]
        plans[key] = [*others[1 - MOST :], plan]
