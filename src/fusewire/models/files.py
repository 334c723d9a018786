"""The files of a checkpoint folder: JSON, and safetensors of which only slices are read."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from .slices import Slice

MAX_JSON = 64 << 20
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = {**FLOATS, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def one_line(e: BaseException) -> str:
    """A foreign exception's text as part of a sentence."""
    return " ".join(str(e).split())[:300]


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise InputError(f"{path} has {path.stat().st_size} bytes, more than {MAX_JSON}; it is not a model's JSON file")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a folder that save_pretrained wrote") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path} is not valid JSON ({one_line(e)}); download it again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a JSON {type(data).__name__}, not an object; download it again")
    return data


class Tensors:
    """The tensors of a folder by name. Files are opened once and mapped, and only the bytes asked for are read.

    bytes_read counts the bytes of every slice handed out.
    """

    def __init__(self, folder: Path):
        self.folder, self.bytes_read = folder, 0
        self._where: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._from_index(index)
            return
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder} has no *.safetensors file; {_instead(folder)}")
        for file in files:
            for name in self._file(file).keys():
                self._add(name, file)

    def _from_index(self, index: Path) -> None:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise InputError(f"{index} has no weight_map from tensor names to file names; download it again")
        for file in sorted(set(names.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(f"{index} names the file {file!r}, which is not a .safetensors file of this folder; "
                                 "do not trust this checkpoint")
            if not (self.folder / file).is_file():
                raise InputError(f"{self.folder / file} does not exist but {index.name} names it; download it again")
        there = {file: set(self._file(self.folder / file).keys()) for file in set(names.values())}
        for name, file in names.items():
            if name not in there[file]:
                raise InputError(f"{self.folder / file} lacks the tensor {name} that {index.name} says it has; download it again")
            self._add(name, self.folder / file)

    def _add(self, name: str, file: Path) -> None:
        if name in self._where:
            raise InputError(f"{file}: the tensor {name} is also in {self._where[name].name}; keep one of the files")
        self._where[name] = file

    def _file(self, file: Path) -> safe_open:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as e:
                raise InputError(f"{file} is truncated or no safetensors file ({one_line(e)}); download it again") from None
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self):
        return iter(self._where)

    def where(self, name: str) -> str:
        """`FILE: NAME`, the start of every sentence about a tensor."""
        return f"{self._where[name]}: {name}"

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A tensor's safetensors dtype and its shape; InputError if there is no such tensor."""
        if name not in self._where:
            raise InputError(f"{self.folder}: the tensor {name} is missing; the checkpoint is incomplete or is of another model")
        s = self._file(self._where[name]).get_slice(name)
        return s.get_dtype(), tuple(s.get_shape())

    def expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """InputError unless the tensor exists with one of these dtypes and one of these shapes."""
        dtype, shape = self.header(name)
        if dtype not in dtypes:
            raise InputError(f"{self.where(name)} is {dtype} where the config asks for {' or '.join(dtypes)}; "
                             "config and weights are of different exports")
        if shape not in shapes:
            raise InputError(f"{self.where(name)} has shape {list(shape)} where the config asks for {list(shapes[0])}; "
                             "config and weights are of different models")

    def read(self, name: str, *dims: Slice) -> Tensor:
        """One Slice for each leading dim: a fresh tensor of the stored dtype, zero where it is padded."""
        dtype, shape = self.header(name)
        cut = tuple(slice(s.start, s.stop) for s in dims)
        out = torch.zeros([s.size for s in dims] + list(shape[len(dims):]), dtype=DTYPES[dtype])
        if all(s.start < s.stop for s in dims):
            try:
                got = self._file(self._where[name]).get_slice(name)[cut or ...]
            except (SafetensorError, OSError) as e:
                raise InputError(f"{self.where(name)} cannot be read ({one_line(e)}); download it again") from None
            self.bytes_read += got.numel() * got.element_size()
            out[tuple(slice(0, s.stop - s.start) for s in dims) or ...] = got
        return out


def _instead(folder: Path) -> str:
    """What to do about a folder without safetensors."""
    kinds = {f.suffix for f in folder.iterdir()}
    if kinds & set(PICKLES):
        return (f"its {'/'.join(sorted(kinds & set(PICKLES)))} files are pickles, which can run code when they are opened: "
                "convert them to safetensors with a tool you trust")
    if ".gguf" in kinds:
        return "GGUF is not read: give the original checkpoint in safetensors"
    return "give a folder that save_pretrained wrote"
