"""Other ways to compute the vision tower and two of its parts, timed, before an option is made of them.

python experiments/vision_parts.py OUT.json

    hidden   27 times gelu_tanh(x w^T + b), [768, 1152] to 4304: the product and the activation apart, or cuBLASLt's
             epilogue (torch._addmm_activation)
    patches  three pictures of bytes to patches: scaled, then cuDNN's convolution in float32; as a product in float32;
             as a product in bf16 with the weight as the sum of three bf16 matrices, in which a byte, being exact, makes
             every product exact
    tower    the whole tower of stack=12_tuned over three pictures, all layers: together; one behind the other; a
             stream each; two together beside the third. Small kernels leave multiprocessors to those of other streams.
             The error is the distance from `together`. Without a GPU of the tiny model, on no streams

Each way is a CUDA graph, rounds take turns. Milliseconds, relative L2 error. Without a GPU only the errors are told, of
the ways that a CPU has.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0exp import compose
from pi0exp.graphs.capture import Graph
from pi0exp.machine import this_machine
from pi0exp.measure import fingerprint
from pi0exp.model.observation import scaled
from pi0exp.policy_subject import PolicySubject
from pi0exp.timing import device_sample_ms
from pi0exp.whole import write_whole

LAYERS, ROWS, WIDTH, HIDDEN, ROUNDS = 27, 768, 1152, 4304, 25
SIZE, PATCH = 224, 14
TOWER = ["stack=12_tuned", "model.paligemma.depth=2", "model.expert.depth=2", "model.vocab_size=4096"]
"""Its table has the products of one, two and three pictures, none in parts of K: streams may share the workspace."""
Ways = dict[str, Callable[[], Tensor]]


def hidden_ways(device: torch.device) -> tuple[Ways, Tensor]:
    """Ways that return the last layer's hidden values [768, 4304], and the truth of these."""
    x = torch.randn(ROWS, WIDTH, device=device).bfloat16()
    weights = [(torch.randn(HIDDEN, WIDTH, device=device) * WIDTH**-0.5).bfloat16() for _ in range(LAYERS)]
    bias = torch.randn(HIDDEN, device=device).bfloat16()
    truth = F.gelu(F.linear(x.double(), weights[-1].double(), bias.double()), approximate="tanh")

    def apart() -> Tensor:
        return [F.gelu(F.linear(x, weight, bias), approximate="tanh") for weight in weights][-1]

    def epilogue() -> Tensor:
        return [torch._addmm_activation(bias, x, weight.t(), use_gelu=True) for weight in weights][-1]

    return {"apart": apart} | ({"epilogue": epilogue} if device.type == "cuda" else {}), truth


def patch_ways(device: torch.device) -> tuple[Ways, Tensor]:
    """Patches [3, 256, 1152], float32, without positions."""
    pictures = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8, device=device)
    weight = torch.randn(WIDTH, 3, PATCH, PATCH, device=device) * (3 * PATCH * PATCH) ** -0.5
    bias = torch.randn(WIDTH, device=device)
    truth = F.conv2d(scaled(pictures).double(), weight.double(), bias.double(), stride=PATCH).flatten(2).mT
    # In the order of the bytes of a patch: row, column, colour. A byte v stands for v * 2 / 255 - 1.
    flat = weight.permute(0, 2, 3, 1).flatten(1)
    moved = (bias.double() - flat.double().sum(1)).float()
    parts, rest = list[Tensor](), flat.double() * 2.0 / 255.0
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].double()
    wide = torch.cat(parts, dim=1)
    side = SIZE // PATCH

    def cut(dtype: torch.dtype) -> Tensor:
        """The bytes of every patch one behind the other, [768, 588]."""
        apart = pictures.view(3, side, PATCH, side, PATCH * 3).transpose(2, 3)
        return apart.to(dtype, memory_format=torch.contiguous_format).reshape(3 * side * side, -1)

    def convolution() -> Tensor:
        return F.conv2d(scaled(pictures), weight, bias, stride=PATCH).flatten(2).mT

    def product() -> Tensor:
        return F.linear(cut(torch.float32) / 255.0 * 2.0 - 1.0, flat, bias).view(3, side * side, WIDTH)

    def three() -> Tensor:
        patches = cut(torch.bfloat16).repeat(1, 3)
        if device.type == "cuda":
            sums = torch.mm(patches, wide.t(), out_dtype=torch.float32)
        else:
            sums = torch.mm(patches.float(), wide.t().float())
        return (sums + moved).view(3, side * side, WIDTH)

    return {"convolution": convolution, "product": product, "three bf16": three}, truth


def tower_ways(device: torch.device) -> tuple[Ways, Tensor]:
    """Tokens of three pictures, [3, P, D]."""
    words = TOWER if device.type == "cuda" else ["model=tiny"]
    policy = PolicySubject.from_plain(compose.from_words(words)).policy(device)
    vision, size = policy.model.vision, policy.model.config.vision.image_size
    pictures = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, device=device)

    def together() -> Tensor:
        return vision(pictures)

    def behind() -> Tensor:
        return torch.cat([vision(pictures[i : i + 1]) for i in range(3)])

    def beside(*sizes: int) -> Tensor:
        """Parts of so many pictures, each on a stream of its own, the first on the current one."""
        current, parts = torch.cuda.current_stream(), pictures.split(sizes)
        others = streams[: len(parts) - 1]
        for stream in others:
            stream.wait_stream(current)
        made = []
        for stream, part in zip((current, *others), parts, strict=True):
            with torch.cuda.stream(stream):
                made.append(vision(part))
        for stream in others:
            current.wait_stream(stream)
        return torch.cat(made)

    ways: Ways = {"together": together, "behind": behind}
    if device.type == "cuda":
        streams = [torch.cuda.Stream() for _ in range(2)]
        ways |= {"stream each": lambda: beside(1, 1, 1), "two and one": lambda: beside(2, 1)}
    return ways, together().double()


def replay_of(way: Callable[[], Tensor]) -> Callable[[int], None]:
    """A call of the way as a graph."""
    graph = Graph(way, 2, lambda line: None)
    return lambda index: graph.replay()


def measured(ways: Ways, truth: Tensor, device: torch.device) -> dict[str, dict[str, object]]:
    """Of each way: rel_l2 and, on a GPU, samples_ms and ms."""
    found: dict[str, dict[str, object]] = {}
    for name, way in ways.items():
        found[name] = {"rel_l2": float((way().double() - truth).norm() / truth.norm())}
    if device.type == "cuda":
        replays = {name: replay_of(way) for name, way in ways.items()}
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, replay in replays.items():
                samples[name].append(device_sample_ms(replay, 0, device))
        for name, times in samples.items():
            found[name] |= {"samples_ms": times, "ms": median(times)}
    return found


PARTS = {"hidden": hidden_ways, "patches": patch_ways, "tower": tower_ways}


def main(arguments: list[str] | None = None) -> int:
    usage, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(description=usage, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="all samples and errors")
    target: Path = parser.parse_args(arguments).out
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, object] = {"command": sys.argv, "fingerprint": fingerprint(this_machine())}
    with torch.inference_mode():
        for part, made_of in PARTS.items():
            ways, truth = made_of(device)
            found[part] = made = measured(ways, truth, device)
            for name, one in made.items():
                time = f"{one['ms']:.4f} ms" if "ms" in one else "not timed without a GPU"
                print(f"{part:8} {name:12} {time}, error {one['rel_l2']:.1e}")
    write_whole(target, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
