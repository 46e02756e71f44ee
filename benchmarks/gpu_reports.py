"""What the compiler made of Mosaic GPU kernels: registers, spills, shared memory, machine instructions, and what is wrong."""

import collections
import dataclasses
import math
import pathlib
import re
from typing import Any


@dataclasses.dataclass
class Kernel:
  """One Mosaic GPU kernel; sizes in bytes, `grid` in blocks, `threads` per block."""
  name: str
  registers: int = 0  # per thread, at launch
  stack: int = 0
  spill_stores: int = 0
  spill_loads: int = 0
  static_shared: int = 0
  dynamic_shared: int = 0
  set_registers: list[int] = dataclasses.field(default_factory=list)  # what warpgroups set for themselves, in order of the code
  grid: tuple[int, ...] = ()
  threads: int = 0
  opcodes: dict[str, int] = dataclasses.field(default_factory=dict)  # machine instructions, without their modifiers
  notes: list[str] = dataclasses.field(default_factory=list)  # advice and warnings of ptxas

  @property
  def shared(self) -> int:
    return self.static_shared + self.dynamic_shared


@dataclasses.dataclass
class Report:
  """What came of one case; `kernels` in the order in which the program runs them, sizes in bytes."""
  case: str
  chip: str
  jax: str = ""
  ptxas: str = ""  # its version
  error: str = ""  # of lowering or compiling, or how the process died; empty if it compiled
  lower_seconds: float = 0.0
  compile_seconds: float = 0.0
  temp: int = 0  # memory that XLA allocates besides arguments and results
  shared_limit: int = 0  # per block, of this chip
  kernels: list[Kernel] = dataclasses.field(default_factory=list)

  def kernel(self, name: str) -> Kernel:
    """The kernel of that name; KeyError, with the names there are, if there is none."""
    for kernel in self.kernels:
      if kernel.name == name:
        return kernel
    raise KeyError(f"no kernel {name!r} in {self.case!r} for {self.chip}; there are {[k.name for k in self.kernels]}"
                   + (f"; it failed: {self.error}" if self.error else ""))

  @classmethod
  def from_json(cls, tree: dict[str, Any]) -> "Report":
    return cls(**{**tree, "kernels": [Kernel(**{**k, "grid": tuple(k["grid"])}) for k in tree["kernels"]]})


def problems(report: Report, *, want: tuple[str, ...] = ("HGMMA",), registers: int = 255) -> list[str]:
  """What a Hopper kernel must not do, with the numbers; empty for a good one.

  Args:
    report: of one case.
    want: machine instructions of which each kernel must have at least one; () for kernels without products.
    registers: the most that a thread may have at launch.
  """
  if report.error:
    return [f"{report.case} for {report.chip}: {report.error}"]
  if not report.kernels:
    return [f"{report.case} for {report.chip}: there is no Mosaic GPU kernel in it"]
  found = []
  for kernel in report.kernels:
    wrong = []
    if kernel.spill_stores or kernel.spill_loads:
      wrong.append(f"spills {kernel.spill_stores} bytes and loads {kernel.spill_loads} again")
    elif kernel.stack:
      wrong.append(f"keeps {kernel.stack} bytes on the stack")
    if kernel.shared > report.shared_limit:
      wrong.append(f"takes {kernel.shared} bytes of shared memory, of {report.shared_limit}")
    if kernel.registers > registers:
      wrong.append(f"takes {kernel.registers} registers, of {registers}")
    count = sum(kernel.opcodes.values())
    wrong += [f"has no {opcode} in {count} instructions" for opcode in want if not kernel.opcodes.get(opcode)]
    wrong += [f"ptxas: {note}" for note in kernel.notes]
    found += [f"{report.case} for {report.chip}, kernel {kernel.name}: {text}" for text in wrong]
  return found


SHOWN = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "MUFU", "LDG", "STG", "LDL", "STL", "BAR", "SYNCS", "SHFL")


def as_text(report: Report) -> str:
  """A report for reading: a line for the case, and some for each kernel."""
  head = f"{report.case} ({report.chip}, JAX {report.jax}, ptxas {report.ptxas})"
  if report.error:
    return f"{head}: {report.error}"
  text = [f"{head}: lowered in {report.lower_seconds:.1f} s, compiled in {report.compile_seconds:.1f} s, "
          f"{report.temp} bytes of temporary memory"]
  for kernel in report.kernels:
    own = f" (then {', '.join(map(str, kernel.set_registers))})" if kernel.set_registers else ""
    text.append(f"  {kernel.name}: {kernel.registers} registers{own}, {kernel.spill_stores} + {kernel.spill_loads} bytes spilled, "
                f"{kernel.shared} bytes of shared memory of {report.shared_limit}, {kernel.threads} threads, grid {kernel.grid}")
    counts = [f"{kernel.opcodes[opcode]} {opcode}" for opcode in SHOWN if opcode in kernel.opcodes]
    text.append(f"    of {sum(kernel.opcodes.values())} instructions: {', '.join(counts)}")
    text += [f"    ptxas: {note}" for note in kernel.notes]
  return "\n".join(text)


def read_kernel(stem: pathlib.Path) -> Kernel:
  """One kernel from the files STEM.ptxas, STEM.sass_ctrl, ... that MOSAIC_GPU_DUMP_TO asks for.

  Raises:
    ValueError: a file lacks what is looked for; the format may have changed.
  """
  kernel = _read_ptxas(_read(stem, ".ptxas"))
  sass = _read(stem, ".sass_ctrl", ".sass")
  kernel.opcodes = dict(collections.Counter(_INSTRUCTION.findall(sass)).most_common())
  kernel.set_registers = [int(count, 16) for count in _SET_REGISTERS.findall(sass)]
  kernel.grid, threads, kernel.dynamic_shared = _read_launch(_read(stem, ".mlir-passes.log"))
  kernel.threads = math.prod(threads)
  return kernel


_THREE = r"\((%\w+), (%\w+), (%\w+)\)"
_LAUNCH = re.compile(rf"gpu\.launch_func .* blocks in {_THREE} threads in {_THREE}.*? dynamic_shared_memory_size (%\w+)")
_VALUE = re.compile(r"\s*(%\w+)(?::\d+)? = (?:(?:arith\.constant |llvm\.mlir\.constant\()(\d+) :)?")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)")  # /*00a0*/ @P0 HGMMA.64x64x16.F32 ...
_SET_REGISTERS = re.compile(r"USETMAXREG\S* .*?0x([0-9a-f]+)")
_ROUTINE = re.compile(r"bytes gmem|Compiling entry function|Function properties|Compile time|Registers are spilled")


def _read_launch(text: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
  """Blocks, threads and bytes of dynamic shared memory, from the passes of the compiler, once they have become constants."""
  constants: dict[str, int] = {}
  for line in text.splitlines():
    if launch := _LAUNCH.search(line):
      sizes = [constants[name] for name in launch.groups() if name in constants]
      if len(sizes) == 7:
        return tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6]
    elif value := _VALUE.match(line):
      name, constant = value.groups()
      constants.pop(name, None)
      if constant is not None:
        constants[name] = int(constant)
  raise ValueError("no launch with constant sizes among the passes of the compiler")


def _read(stem: pathlib.Path, *suffixes: str) -> str:
  for suffix in suffixes:
    path = stem.with_name(stem.name + suffix)
    if path.exists():
      return path.read_text()
  raise ValueError(f"{stem} has no file ending in {' or '.join(suffixes)}: was the kernel disassembled?")


def _read_ptxas(text: str) -> Kernel:
  """The kernel's name and numbers as `ptxas -v` prints them; every line that is not routine becomes a note."""
  name = re.search(r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?'", text)
  stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
  used = re.search(r"Used (\d+) registers", text)
  if not (name and stack and used):
    raise ValueError(f"not a report of ptxas -v: {text!r}")
  shared = re.search(r"(\d+) bytes smem", text)
  kernel = Kernel(name.group(1), registers=int(used.group(1)), static_shared=int(shared.group(1)) if shared else 0)
  kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, stack.groups())
  for line in text.splitlines():
    level, _, rest = line.strip().partition(":")
    if level.startswith("ptxas") and not (_ROUTINE.search(rest.strip()) or used.group() in rest):
      kernel.notes.append(f"{level.removeprefix('ptxas').strip()}: {rest.strip()}")
  return kernel
