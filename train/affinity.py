"""`python -m train affinity`: fit how freely the random walk of a checkpoint walks; no other weight changes.

Objects of the train split are clicked through as in evaluation, once with the walk that the checkpoint has and then
with what was learnt from it. Of every pass is kept what the network said, on the walk's grid. Then the walk is done
again on that grid and its mask compared with the truth: gradients go through the equations that the walk solves
(`Walk`) into the links (inter2former/nn/affinity.py) and the trust in the network, the walk's two unknowns.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from inter2former import evaluation, random_walk
from inter2former.checkpoints import load_checkpoint
from inter2former.errors import ConfigError, Inter2FormerError
from inter2former.images import Frame
from inter2former.nn.affinity import WIDTH, Affinity
from inter2former.nn.model import ImageEncoding, Inter2Former
from inter2former.prompts import Click
from inter2former.random_walk import CELLS, ITERATIONS, NEARLY, SOFTNESS, SURE, neighbours
from inter2former.reference_mask import DEFINITE_BACKGROUND, DEFINITE_FOREGROUND
from inter2former.runtime.packing import pack as pack_model
from inter2former.segmenter import ModelSize, Segmenter
from inter2former.terminal import print_rows, score_progress
from train import fitted

CLICKS = 5  # an object; later ones change little that a walk can see
STEPS, WARMUP, BATCH, LR, DECAY = 2000, 50, 16, 2e-3, 0.05
FIRST = 0.4  # of the passes are first clicks, where the network knows least
TRUST_LR = 5e-3

Float16 = npt.NDArray[np.float16]


class Seen(NamedTuple):
    """An image as `Affinity` sees it: tokens [d, n, n], edges [c, m, m], colours [3, CELLS, CELLS]; float16."""

    tokens: Float16
    edges: Float16
    colours: Float16


class Pass(NamedTuple):
    """A decoder pass on the walk's grid, float16 [CELLS, CELLS] each.

    said                 mean logits, before the walk
    object_, background  how much of a cell was clicked
    truth                how much of a cell is object
    """

    image: int  # number of its `Seen`
    source: str
    clicks: int
    shown: tuple[int, int]  # rows and columns of cells that show the photo
    said: Float16
    object_: Float16
    background: Float16
    truth: Float16


def _cells(values: npt.NDArray[Any]) -> Float16:
    side = len(values) // CELLS
    means: Float16 = values.reshape(CELLS, side, CELLS, side).mean((1, 3), dtype=np.float32).astype(np.float16)
    return means


class _Watching(Segmenter):
    """Keeps every image and every pass while the target, which has to be said, is clicked through."""

    passes: list[Pass]
    images: list[Seen]
    target: evaluation.Target

    def watch(self, affinity: Affinity) -> None:
        self.passes, self.images = [], []
        affinity.register_forward_pre_hook(self._see)

    def _see(self, _: torch.nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> None:
        tokens, edges, image = given
        colours = F.avg_pool2d(image, image.shape[-1] // CELLS)
        kept = (part[0].numpy().astype(np.float16) for part in (tokens, edges, colours))
        self.images.append(Seen(*kept))

    def _walked(self, found: Any, encoding: ImageEncoding, reference: Any, clicks: int, frame: Frame) -> Any:
        if not random_walk.is_thin(found.inside, frame.size):  # nobody walks there, so nothing is to be learnt
            logits = found.logits(frame.size).numpy().clip(-SURE, SURE)
            truth = frame.mask_to_model(self.target.mask)
            states = (reference == DEFINITE_FOREGROUND, reference == DEFINITE_BACKGROUND)
            rows, columns = (-(-side * CELLS // frame.size) for side in frame.valid)
            maps = (_cells(part) for part in (logits, *states, truth))
            self.passes.append(Pass(len(self.images) - 1, self.target.source, clicks, (rows, columns), *maps))
        return super()._walked(found, encoding, reference, clicks, frame)


def collect(
    model: Inter2Former,
    targets: Iterable[evaluation.Target],
    clicks: int = CLICKS,
    *,
    colours: bool = False,
    model_size: ModelSize = "auto",
    on_score: Callable[[evaluation.Score], object] | None = None,
) -> tuple[list[Seen], list[Pass]]:
    """Every image, and every pass, while clicking through the targets.

    model    with an affinity, and packed
    targets  the objects of one image follow one another
    colours  say how freely one walks, whatever the affinity does
    """
    assert model.affinity is not None
    watching = _Watching(model, model_size=model_size, cache_bytes=64 << 20)
    watching.config = dataclasses.replace(watching.config, level_weights=())
    if colours:
        watching.config = dataclasses.replace(watching.config, affinity_width=0)
    watching.watch(model.affinity)

    def said() -> Iterator[evaluation.Target]:
        for watching.target in targets:
            yield watching.target

    def segment(image: evaluation.Image, made: Sequence[Click]) -> evaluation.Mask:
        return watching.segment(image, made).mask

    evaluation.evaluate(said(), segment, clicks=clicks, on_score=on_score)
    return watching.images, watching.passes


# -- the walk, with gradients ----------------------------------------------------------------------------------------


def _around(links: Tensor, x: Tensor) -> Tensor:
    """links [B, 4, CELLS, CELLS], x [B, CELLS, CELLS] -> the sum over each cell's neighbours of link * x."""
    total = torch.zeros_like(x)
    for n, (here, there) in enumerate(neighbours(CELLS, CELLS)):
        link = links[:, n, *here]
        total[:, *here] += link * x[:, *there]
        total[:, *there] += link * x[:, *here]
    return total


def _solve(links: Tensor, leave: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """leave * x - around(x) = right by conjugate gradients, preconditioned by the diagonal, from x.

    links [B, 4, CELLS, CELLS], the others [B, CELLS, CELLS], also what is returned.
    """
    residual = right - (leave * x - _around(links, x))
    scaled = residual / leave
    direction = scaled.clone()
    energy = (residual * scaled).sum((1, 2), keepdim=True)
    for _ in range(ITERATIONS):
        product = leave * direction - _around(links, direction)
        length = energy / (direction * product).sum((1, 2), keepdim=True).clamp_min(1e-20)
        x = x + length * direction
        residual = residual - length * product
        scaled = residual / leave
        before, energy = energy, (residual * scaled).sum((1, 2), keepdim=True)
        direction = scaled + direction * (energy / before.clamp_min(1e-20))
    return x


class Walk(torch.autograd.Function):
    """Chances of random_walk.py and their gradients: those of A x = b are another solution of the same equations."""

    @staticmethod
    def forward(ctx: Any, links: Tensor, trust: Tensor, said: Tensor, object_: Tensor, background: Tensor) -> Tensor:
        """links [B, 4, CELLS, CELLS], trust [B, 1, 1], the others [B, CELLS, CELLS] -> chances, the same."""
        leave = (_around(links, torch.ones_like(said)) + trust + object_ + background).clamp_min(1e-8)
        x = _solve(links, leave, trust * said + object_, said)
        ctx.save_for_backward(links, leave, said, x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        links, leave, said, x = ctx.saved_tensors
        back = _solve(links, leave, gradients[0], torch.zeros_like(x))
        of_links = torch.zeros_like(links)
        for n, (here, there) in enumerate(neighbours(CELLS, CELLS)):
            of_links[:, n, *here] = -(back[:, *here] - back[:, *there]) * (x[:, *here] - x[:, *there])
        return of_links, (back * (said - x)).sum((1, 2), keepdim=True), None, None, None


def _walk(*given: Tensor) -> Tensor:
    return cast(Tensor, Walk.apply(*given))  # type: ignore[no-untyped-call]


class Data:
    """Images and passes of all rounds, in batches."""

    def __init__(self) -> None:
        self.images: list[Seen] = []
        self.passes: list[Pass] = []

    def add(self, images: Sequence[Seen], passes: Sequence[Pass]) -> None:
        first = len(self.images)
        self.images += images
        self.passes += [one._replace(image=one.image + first) for one in passes]

    def seen(self, passes: Sequence[Pass]) -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        """Which passes belong together, and what `Affinity` takes for their images; images differ in T."""
        by_size: dict[int, list[int]] = {}
        for n, one in enumerate(passes):
            by_size.setdefault(self.images[one.image].tokens.shape[-1], []).append(n)
        for numbers in by_size.values():
            parts = zip(*(self.images[passes[n].image] for n in numbers), strict=True)
            maps = (torch.from_numpy(np.stack(part).astype(np.float32)) for part in parts)
            yield numbers, tuple(part.contiguous(memory_format=torch.channels_last) for part in maps)


def _stack(maps: Iterable[Float16]) -> Tensor:
    return torch.from_numpy(np.stack(list(maps)).astype(np.float32))


def _inside(passes: Sequence[Pass]) -> Tensor:
    """float32 [B, CELLS, CELLS]: 1 where the photo is."""
    inside = torch.zeros(len(passes), CELLS, CELLS)
    for n, one in enumerate(passes):
        inside[n, : one.shown[0], : one.shown[1]] = 1
    return inside


def walked(
    affinity: Affinity | None, first: Tensor, data: Data, passes: Sequence[Pass], *, mirrored: bool = False
) -> Tensor:
    """Logits after the walk, [B, CELLS, CELLS].

    affinity  without one colours say how freely one walks
    first     the trust in the network at the first click, a scalar
    mirrored  walk in everything's mirror image, which is what is returned; not for colours
    """

    def seen(maps: Tensor) -> Tensor:
        return maps.flip(-1) if mirrored else maps

    links = torch.empty(len(passes), 4, CELLS, CELLS)
    for numbers, (tokens, edges, colours) in data.seen(passes):
        if affinity is not None:
            links[numbers] = random_walk.from_logarithms(affinity(*(seen(part) for part in (tokens, edges, colours))))
            continue
        for n, of_cells in zip(numbers, colours, strict=True):
            rows, columns = passes[n].shown
            links[n] = torch.from_numpy(random_walk.links(of_cells[:, :rows, :columns], CELLS)).view(4, CELLS, CELLS)
    inside = seen(_inside(passes))
    both = torch.zeros_like(links)
    for direction, (here, there) in enumerate(neighbours(CELLS, CELLS)):
        both[:, direction, *here] = inside[:, *here] * inside[:, *there]
    links = links * both
    growth = torch.tensor([random_walk.GROWTH ** (max(one.clicks, 1) - 1) for one in passes])
    trust = (first * growth).clamp_max(random_walk.MOST_TRUST).view(-1, 1, 1)
    said, object_, background = (
        seen(_stack(getattr(one, name) for one in passes)) for name in ("said", "object_", "background")
    )
    chance = _walk(links, trust, torch.sigmoid(said / SOFTNESS), object_, background)
    chance = chance.clamp(NEARLY, 1 - NEARLY)
    return said * (1 - 1 / SOFTNESS) + torch.log(chance / (1 - chance))


def loss(logits: Tensor, truth: Tensor, inside: Tensor) -> Tensor:
    """1 - soft IoU, and cross entropy weighted by the error, so that what is nearly right still counts."""
    chance = torch.sigmoid(logits) * inside
    both = (chance * truth).sum((1, 2))
    overlap = (both + 1e-3) / ((chance + truth - chance * truth).sum((1, 2)) + 1e-3)
    wrong = (chance - truth).detach() ** 2 * inside
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (1 - overlap + 0.5 * (wrong * entropy).sum((1, 2)) / (wrong.sum((1, 2)) + 1e-6)).mean()


def fit(
    affinity: Affinity,
    first: float,
    data: Data,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    lr: float = LR,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = lambda steps: steps,
) -> float:
    """Train the affinity in place; returns the trust in the network at the first click that goes with it.

    The same for the same passes on one machine. Sources count with the root of their passes.

    raises  ConfigError when there are too few passes to learn from
    """
    affinity.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
    by_source: dict[str, tuple[list[Pass], list[Pass]]] = {}
    for one in data.passes:
        by_source.setdefault(one.source, ([], []))[one.clicks > 1].append(one)
    if len(data.passes) < batch:
        raise ConfigError(f"{len(data.passes)} passes are too few to learn from.", "Give more objects.")
    sources = sorted(by_source)
    share = np.array([math.sqrt(sum(map(len, by_source[name]))) for name in sources])
    share /= share.sum()
    rng = np.random.default_rng(seed)
    trust = torch.nn.Parameter(torch.tensor(math.log(first)))
    groups = [
        {"params": list(affinity.parameters()), "lr": lr, "weight_decay": DECAY},
        {"params": [trust], "lr": TRUST_LR, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in progress(range(steps)):
        chosen = []
        for name in rng.choice(sources, batch, p=share):
            firsts, later = by_source[name]
            pool = firsts if firsts and (not later or rng.random() < FIRST) else later
            chosen.append(pool[rng.integers(len(pool))])
        mirrored = bool(rng.random() < 0.5)
        logits = walked(affinity, trust.exp(), data, chosen, mirrored=mirrored)
        truth, inside = _stack(one.truth for one in chosen), _inside(chosen)
        error = loss(logits, *(maps.flip(-1) if mirrored else maps for maps in (truth, inside)))
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(affinity.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(f"{math.exp(float(trust.detach())):.2g}")


@torch.no_grad()
def ious(affinity: Affinity | None, first: float, data: Data, clicks: Sequence[int] = (1, 2, 3, 5)) -> dict[str, float]:
    """Mean IoU of the cells' masks after so many clicks, mean over sources; 0..1."""
    out = {}
    for k in clicks:
        found: dict[str, list[float]] = {}
        passes = [one for one in data.passes if one.clicks == k]
        for begin in range(0, len(passes), 32):
            some = passes[begin : begin + 32]
            masks = (walked(affinity, torch.tensor(first), data, some) > 0) & (_inside(some) > 0)
            truth = _stack(one.truth for one in some)
            both, either = (masks * truth).sum((1, 2)), torch.where(masks, 1.0, truth).sum((1, 2))
            for one, iou in zip(some, (both / either).tolist(), strict=True):
                found.setdefault(one.source, []).append(iou)
        if found:
            out[f"IoU@{k}"] = round(statistics.fmean(map(statistics.fmean, found.values())), 4)
    return out


def with_affinity(model: Inter2Former, width: int, seed: int) -> Inter2Former:
    """The model with an affinity of that width: its own, if it has one, else random weights."""
    return fitted.with_part(model, "affinity", seed, affinity_width=width)


def write(checkpoint: Path, out: Path, affinity: Affinity, first: float, facts: dict[str, Any]) -> str:
    """The checkpoint with this affinity and trust; returns the digest."""

    def change(model: Inter2Former) -> Inter2Former:
        model = with_affinity(model, affinity.tokens.out_channels, 0)
        assert model.affinity is not None
        model.affinity.load_state_dict(affinity.state_dict())
        model.config = dataclasses.replace(model.config, walk_trust=first)
        return model

    return fitted.write(checkpoint, out, "affinity", facts, change)


def command(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint to fit; with a random walk.")],
    data: Annotated[Path, typer.Option(help="A pack with the splits train and val.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write; may be the same file.")],
    limit: Annotated[int, typer.Option(min=1, help="Objects a source to fit on.")] = 300,
    val_limit: Annotated[int, typer.Option(min=1, help="Objects a source to report on.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Each learns from those before it too.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser, each round.")] = STEPS,
    trust: Annotated[
        float | None, typer.Option(min=1e-6, max=1.0, help="In the network at the first click [as learnt].")
    ] = None,
    width: Annotated[int, typer.Option(min=2, help="Channels.")] = WIDTH,
    model_size: Annotated[int | None, typer.Option(help="Model size T [where the checkpoint finds masks].")] = None,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads [all cores].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit how freely one walks between neighbouring places, for a checkpoint with a random walk. Levels and scores
    (`calibrate`) are to be learnt again afterwards."""
    size: ModelSize = "auto" if model_size is None else model_size
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = load_checkpoint(checkpoint).model
        first = loaded.config.walk_trust
        if not first:
            raise ConfigError("The checkpoint has no random walk.", "Its configuration has walk_trust = 0.")
        fresh = loaded.config.affinity_width != width
        model = with_affinity(loaded, width, seed)
        if model.config.coarse_size and size == "auto":  # outlines that are drawn finer are another matter
            sizes = tuple(side for side in (256, 512) if side <= model.config.coarse_size)
            model.config = dataclasses.replace(model.config, auto_sizes=sizes or (model.config.coarse_size,))
        affinity = model.affinity
        assert affinity is not None
        learnt = Affinity(model.config)
        learnt.load_state_dict(affinity.state_dict())
        packed = pack_model(model)
        assert packed.affinity is not None
        seen, held_out = Data(), Data()
        with evaluation.Pack(data) as pack:

            def passes(split: str, n: int, colours: bool) -> tuple[list[Seen], list[Pass]]:
                refs = pack.choose(split, n)
                with score_progress(len(refs), f"{split}, passes") as advance:
                    return collect(packed, pack.targets(refs), colours=colours, model_size=size, on_score=advance)

            held_out.add(*passes("val", val_limit, fresh))
            figures = {"before": ious(None if fresh else learnt, first, held_out)}
            for number in range(rounds):
                seen.add(*passes("train", limit, fresh and number == 0))
                say = f"round {number + 1} of {rounds}"

                def shown(numbers: range, say: str = say) -> Iterable[int]:
                    return track(numbers, description=say, disable=as_json)

                first = fit(learnt, first, seen, steps=steps, seed=seed, progress=shown)
                packed.affinity.load_state_dict(learnt.state_dict())
                packed.config = dataclasses.replace(packed.config, walk_trust=first)
                figures[f"after {number + 1}"] = ious(learnt, first, held_out)
            if trust is not None:
                first = trust
                figures["with that trust"] = ious(learnt, first, held_out)
        facts = {"objects a source": limit, "rounds": rounds, "steps": steps, "val": figures, "trust": first}
        digest = write(checkpoint, out, learnt, first, facts)
    except (Inter2FormerError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"out": str(out), "sha256": digest, "trust": first, **figures}))
        return
    print_rows("IoU of the walk's masks on its own grid", [{"": name, **row} for name, row in figures.items()])
    typer.echo(f"wrote {out}")
