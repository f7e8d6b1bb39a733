"""Wrong command lines about backbones and layers: each gets its one line, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, TinyFamily, TinyNetwork

Cli = Callable[..., Outcome]
TINY = "extract {photos} --backbone tiny --weights none "
CONV = "extract {photos} --backbone onnx:{conv} "
OPEN = "extract {photos} --backbone onnx:{open} "
PLAIN = "--mean 0 --std 1 "

# What is wrong: the command line, and what the line must say.
WRONG: dict[str, tuple[str, str]] = {
    "unknown layer": (TINY + "--layer nrm", "tiny has no layer 'nrm': did you mean norm"),
    "layer like no other": (
        TINY + "--layer qqq:avg",
        "tiny has no layer 'qqq': `featcache backbones tiny` lists its 5 layers",
    ),
    "map without a pool": (
        TINY + "--layer conv",
        (
            "layer conv of tiny gives 8 x 8 x 8 numbers per image, not a vector; say how to pool them: --layer "
            "conv:avg, or max, flatten, cls"
        ),
    ),
    "cls of a map": (
        TINY + "--layer conv:cls",
        (
            "layer conv of tiny has no tokens but a map of 8 x 8 x 8; --pool cls is for transformers, expected "
            "avg, max or flatten"
        ),
    ),
    "layer twice": (TINY + "--layer conv:avg --layer conv:avg", "--layer conv is given twice; once is enough"),
    "pool of a vector": (
        TINY + "--pool avg",
        "--pool avg has nothing to pool: the features of tiny are a vector; name a --layer",
    ),
    "unknown pool of a layer": (
        TINY + "--layer conv:mean",
        "--layer conv:mean: unknown pool 'mean', expected NAME or NAME:POOL with avg, max, flatten, cls",
    ),
    "unknown pool": (TINY + "--layer conv --pool mean", "'mean' is not one of"),
    "empty layer": (TINY + "--layer :avg", "tiny has no layer ''"),
    "wrong channel count": (TINY + "--channels L --mean 0 --std 1", "tiny does not take images of 1 x 16 x 16 ("),
    "unknown channels": (TINY + "--channels RGBA", "'RGBA' is not one of"),
    "means for two channels": (TINY + "--mean 0.1,0.2", "--mean has 2 numbers: expected 3, one per channel"),
    "mean that is no number": (TINY + "--mean grey", "'grey' is no list of numbers: expected such as 0.5"),
    "std of zero": (TINY + "--std 0.1,0,0.1", "--std is (0.1, 0.0, 0.1): expected numbers other than 0"),
    "scale below zero": (TINY + "--scale -1", "--scale is -1.0: expected a number above 0, such as 1 or 255"),
    "scale that is no number": (TINY + "--scale nan", "--scale is nan: expected a number above 0"),
    "mean that is infinite": (TINY + "--mean inf", "--mean is (inf,): expected"),
    "size that is none": (TINY + "--input-size big", "'big' is no size: expected pixels, such as 224, or HEIGHTxWIDTH"),
    "size of zero": (TINY + "--input-size 0x16", "'0x16' is no size"),
    "size too small for the network": (
        "extract {photos} --backbone alexnet --weights none --input-size 16",
        "alexnet does not take images of 3 x 16 x 16 (",
    ),
    "unknown interpolation": (TINY + "--interpolation cubic", "'cubic' is not one of"),
    "layout for torch": (
        TINY + "--layout NHWC",
        "--layout NHWC is for onnx:FILE; tiny takes its images as torch has them",
    ),
    "unknown layout": (CONV + PLAIN + "--layout CHWN", "'CHWN' is not one of"),
    "unknown backbone": (
        "extract {photos} --backbone resnet-18",
        "unknown backbone 'resnet-18': did you mean resnet18?",
    ),
    "unknown prefix": ("extract {photos} --backbone tensorflow:resnet50", "unknown backbone 'tensorflow:resnet50'"),
    "unknown weights": (
        "extract {photos} --backbone resnet18 --weights IMAGENET1K_V9",
        "no weights at IMAGENET1K_V9: expected default, none, IMAGENET1K_V1, the path of a state dict",
    ),
    "weights of another network": (
        "extract {photos} --backbone squeezenet1_1 --weights {weights}",
        "weights from tiny.pth do not fit: tensor features.0.weight (64, 3, 3, 3) is missing",
    ),
    "unknown network of timm": (
        "extract {photos} --backbone timm:resnet10 --weights none",
        "unknown backbone 'timm:resnet10': did you mean timm:resnet10t?",
    ),
    "unknown tag of timm": (
        "extract {photos} --backbone timm:resnet10t.wrong --weights none",
        "unknown backbone 'timm:resnet10t.wrong'",
    ),
    "timm without a name": ("extract {photos} --backbone timm: --weights none", "unknown backbone 'timm:'"),
    "no ONNX file": (
        "extract {photos} --backbone onnx:nothing.onnx",
        "no ONNX file at nothing.onnx: expected onnx:FILE with the path of a network exported to ONNX",
    ),
    "ONNX without a file": ("extract {photos} --backbone onnx:", "no ONNX file at"),
    "ONNX file that is none": (
        "extract {photos} --backbone onnx:{weights} " + PLAIN,
        "{weights} is not an ONNX file (DecodeError)",
    ),
    "pixels not stated": (
        CONV,
        (
            "onnx:{conv} does not say what its images must look like: give --mean and --std (--mean 0 --std 1 for "
            "plain pixels in [0, 1]; --scale 255 if they go to 255), or put them into {json}"
        ),
    ),
    "size not stated": (
        OPEN + PLAIN + "--layout NCHW",
        "does not say what its images must look like: give --input-size",
    ),
    "layout not to be told": (OPEN + PLAIN + "--input-size 8", "say it with --layout NCHW, NHWC or NF"),
    "size of another network": (CONV + PLAIN + "--input-size 20", "these are [3, 20, 20]; say --input-size"),
    "layout of another network": (CONV + PLAIN + "--layout NF", "which does not fit --layout NF"),
    "unknown layer of ONNX": (CONV + PLAIN + "--layer map:avg", "onnx:{conv} has no layer 'map': did you mean maps"),
    "random weights of ONNX": (CONV + PLAIN + "--weights none", "has its own weights; --weights none is for networks"),
    "weights for ONNX": (CONV + PLAIN + "--weights {weights}", "has its weights inside; --weights cannot change them"),
    "ONNX fine-tuned": (
        "finetune {photos} --backbone onnx:{stated}",
        (
            "onnx:{stated} cannot be fine-tuned: an ONNX network is run, not trained: it serves as a frozen backbone "
            "only; use `featcache train-head`"
        ),
    ),
    "module without a function": ("extract {photos} --backbone module:nets", "module:nets is no function: expected"),
    "module that is not there": (
        "extract {photos} --backbone module:no_such_package.net",
        "module:no_such_package.net cannot be imported (ModuleNotFoundError: No module named 'no_such_package')",
    ),
    "function that is not there": (
        "extract {photos} --backbone module:json.net",
        "module:json.net cannot be imported (AttributeError: module 'json' has no attribute 'net')",
    ),
    "function that makes no network": (
        "extract {photos} --backbone module:os.getcwd",
        "gave str: expected a torch.nn.Module",
    ),
    "function that wants arguments": (
        "extract {photos} --backbone module:math.sqrt",
        "module:math.sqrt raised TypeError: ",
    ),
    "network without a word on its images": (
        "extract {photos} --backbone module:conftest.TinyNetwork",
        "module:conftest.TinyNetwork does not say what its images must look like: give --input-size and --mean and",
    ),
    "backbones: unknown name": ("backbones resnet-18", "unknown backbone 'resnet-18': did you mean resnet18?"),
    "backbones: pattern without a match": ("backbones qqq*", "no backbone is called qqq*; try '*'"),
    "backbones: unknown kind": ("backbones --kind audio", "'audio' is not one of"),
    "compare: backbone twice": (
        "compare {photos} --backbone tiny --backbone tiny --weights none",
        "expected each once",
    ),
    "compare: epochs of heads": (
        "compare {photos} --backbone tiny --backbone resnet18 --epochs 3",
        "--epochs is of fine-tuning, and several backbones are compared by their heads alone",
    ),
    "compare: epochs of caches": (
        "compare {weights} {weights} --epochs 3",
        "--epochs is for a folder of images: caches are ranked by new heads on what they hold",
    ),
    "compare: file that is no cache": ("compare {weights} {weights}", "{weights}"),
    "compare: backbones of which none can be used": (
        "compare {photos} --backbone nothing --backbone tiny:3 --weights none",
        "unknown backbone",
    ),
}


@pytest.fixture
def places(photos: Path, tmp_path: Path) -> dict[str, Path]:
    """The data set, weights of a tiny network, and three ONNX files."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("timm")
    pytest.importorskip("onnxruntime")
    torch.save(TinyNetwork().state_dict(), tmp_path / "tiny.pth")
    places = {"photos": photos, "weights": tmp_path / "tiny.pth", "json": tmp_path / "conv.json"}
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    kernel = onnx.numpy_helper.from_array(torch.ones(4, 3, 3, 3).numpy(), "kernel")
    for name, shape in (("conv", ["n", 3, 16, 16]), ("open", ["n", "a", "b", "c"]), ("stated", ["n", 3, 16, 16])):
        graph = helper.make_graph(
            [
                helper.make_node("Conv", ["images", "kernel"], ["maps"]),
                helper.make_node("ReduceMean", ["maps"], ["out"], axes=[2, 3], keepdims=0),
            ],
            "small",
            [helper.make_tensor_value_info("images", kind, shape)],
            [helper.make_tensor_value_info("out", kind, None)],
            [kernel],
        )
        places[name] = tmp_path / f"{name}.onnx"
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, places[name])
    (tmp_path / "stated.json").write_text('{"mean": 0, "std": 1}')
    return places


def check_refused(outcome: Outcome, expected: str) -> None:
    """Exit code 1 or 2, nothing on stdout, one line of error with these words in it, no traceback."""
    assert outcome.code in (1, 2), outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, outcome.err
    assert outcome.err.splitlines()[-1] == errors[0]
    assert expected in errors[0]


@pytest.mark.parametrize(("line", "expected"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(
    line: str, expected: str, cli: Cli, places: dict[str, Path], tiny: type[TinyFamily]
) -> None:
    outcome = cli(*(word.format(**places) for word in line.split()))
    check_refused(outcome, expected.format(**places))
    assert not Path("features.h5").exists()
    assert not Path("features.h5.parts").exists()
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("package", "backbone", "expected"),
    [
        ("timm", "timm:resnet18", "backbones timm:NAME need an optional package: pip install 'featcache[timm]'"),
        ("onnxruntime", "onnx:{conv}", "backbones onnx:FILE need an optional package: pip install 'featcache[onnx]'"),
        ("onnx", "onnx:{conv}", "layers inside onnx:FILE need an optional package: pip install 'featcache[onnx]'"),
    ],
)
def test_a_missing_extra_is_said_with_the_line_that_installs_it(
    package: str, backbone: str, expected: str, cli: Cli, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ("--mean", "0", "--std", "1", "--layer", "maps:avg")
    outcome = cli("extract", places["photos"], "--backbone", backbone.format(**places), *options)
    check_refused(outcome, expected)
    assert not Path("features.h5").exists()
