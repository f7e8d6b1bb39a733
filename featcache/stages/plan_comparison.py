"""What a comparison would do, before it does anything: which arms and seeds, what is there, how long the rest takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from featcache.backbones import check_trainable
from featcache.cache import check_complete, open_cache
from featcache.config import RUNS_DIR, VIEWS, CompareConfig, ExtractConfig, FinetuneConfig, is_imported
from featcache.dataset import Listing, describe_data
from featcache.errors import CacheError, FeatcacheError, RunError
from featcache.files import canonical_json, hash_bytes
from featcache.progress import SILENT, Progress
from featcache.runs import RunRecord, is_run, name_predictions, read_history, read_predictions, read_record
from featcache.stages.forecast import forecast_extraction
from featcache.stages.forecast_training import forecast_training
from featcache.stages.plan import Plan
from featcache.stages.training_job import name_checkpoint
from featcache.storage import Place, locate
from featcache.training import Checkpoints
from featcache.wording import format_seconds

DEFAULT_VIEWS = 4
REPORT_SECONDS = 8.0  # that the figures, thumbnails and the page take
LEAST_SECONDS = 5.0  # that a fine-tuning can be given
HEAD_SECONDS = 0.6  # of a head that has hardly any rows
HEAD_RATE = 7e6  # images x features x classes a second that choosing C and fitting go through; measured on 2 cores
CURVE_HEADS = 12  # times as long as a head takes its learning curve
CURVE_SECONDS = 60.0  # up to which the report has a learning curve by itself
BUDGET_OF = "featcache compare"  # what a fine-tune's record says that its budget has cut short
CUT = "-cut"  # of the names of runs that a budget has cut short


@dataclass(frozen=True, kw_only=True)
class Source:
    """A cache of features that arms learn from.

    Attributes
    ----------
    path
        The file.
    settings
        For `extract_features`.
    """

    path: Place
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """A way that is compared.

    Attributes
    ----------
    name
        In tables, and of its folders.
    kind
        "head" or "finetune".
    source
        The features; of fine-tuning those of the same backbone, which say which images there are.
    settings
        For `train_head` or `finetune`: what is stated, and must be so in a run that is reused.
    """

    name: str
    kind: str
    source: Source
    settings: dict[str, Any]

    def name_folder(self, runs: Path, number: int) -> Path:
        """Where the run of a seed is; the first has no number."""
        return runs / (self.name if not number else f"{self.name}-seed{number}")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that is to be done, or need not be.

    Attributes
    ----------
    what
        "extraction", "head", "finetune" or "report".
    place
        The file or folder that comes of it.
    arm
        The arm's name; "" of what is for all.
    number
        Of the seed, from 0 on.
    state
        "reuse", "resume" or "make".
    seconds
        How long it will take, about; None if that could not be found out.
    """

    what: str
    place: Place
    state: str
    seconds: float | None
    arm: str = ""
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """What a comparison would do.

    Attributes
    ----------
    data
        The folder of images.
    arms
        The ways.
    seeds
        How many trainings of each.
    steps
        In the order in which they are done.
    budget
        Seconds that all may take.
    """

    data: str
    arms: tuple[ArmPlan, ...]
    seeds: int
    steps: tuple[Step, ...]
    budget: float | None

    @property
    def seconds(self) -> float:
        """About how long all of it takes."""
        return sum(step.seconds or 0.0 for step in self.steps)

    def find_seconds(self, what: str) -> float:
        """About how long all steps of a kind take."""
        return sum(step.seconds or 0.0 for step in self.steps if step.what == what)

    def find_least(self) -> float:
        """About how long it takes at least: features, one head of each arm, a few steps of each network, the report."""
        heads = sum(step.seconds or 0.0 for step in self.steps if step.what == "head" and not step.number)
        missing = [step for step in self.steps if step.what == "finetune" and step.state != "reuse" and not step.number]
        return self.find_seconds("extraction") + heads + LEAST_SECONDS * len(missing) + REPORT_SECONDS

    def list_lines(self) -> list[str]:
        """The plan for people."""
        n = len(self.arms)
        unknown = any(step.seconds is None for step in self.steps)
        about = f"{'more than' if unknown else 'about'} {say_time(self.seconds)}"
        seeds = f", {self.seeds} seeds each" if self.seeds > 1 else ""
        budget = f", within {say_time(self.budget)}" if self.budget is not None else ""
        words = [(step.what, str(step.place), say_state(step)) for step in self.steps]
        widths = [max(len(row[i]) for row in words) for i in range(2)]
        rows = [f"  {what:<{widths[0]}}  {place:<{widths[1]}}  {state}" for what, place, state in words]
        rows = [f"plan: {n} arm{'s' if n > 1 else ''}{seeds}, {about}{budget}", *rows]
        if self.budget is not None and self.find_least() > self.budget:
            rows.append(f"  the budget is too small: {say_time(self.find_least())} are needed at least")
        elif self.budget is not None and self.seconds > self.budget:
            rows.append("  not all of it fits: further seeds are left out then, and fine-tuning is cut short")
        return rows

    def describe(self) -> dict[str, Any]:
        """As plain values; see docs/json.md."""
        steps = [{**asdict(step), "place": str(step.place)} for step in self.steps]
        arms = [{"name": arm.name, "kind": arm.kind, "settings": arm.settings} for arm in self.arms]
        return {"data": self.data, "arms": arms, "steps": steps, "seconds": self.seconds, "budget": self.budget}


def say_time(seconds: float) -> str:
    """Seconds that are about right.

    >>> say_time(0.645), say_time(139.2)
    ('0.6 s', '2 min 19 s')
    """
    return f"{seconds:.1f} s" if seconds < 1 else format_seconds(seconds)


def say_state(step: Step) -> str:
    """What is to be done, and how long it takes."""
    if step.state == "reuse":
        return "reused"
    about = "" if step.seconds is None else f"about {say_time(step.seconds)}"
    return ", ".join(filter(None, ("goes on where it was left" if step.state == "resume" else "", about))) or "to do"


# --- what is wanted ---------------------------------------------------------------------------------------------------


def adopt_existing(config: CompareConfig, progress: Progress) -> CompareConfig:
    """Take what was not stated about the extraction from the cache that lies there, else from the fine-tuning run."""
    if len(config.backbones) > 1:
        return config
    names = ("backbone", "weights", "val_fraction", "seed", "store")
    finetune_run = Path(config.runs) / "finetune"
    found: Mapping[str, Any] = {}
    if locate(config.features).is_file():
        cache = open_cache(config.features)
        check_complete(cache, config.features)
        if is_imported(cache.extractor["backbone"]) and not config.force:
            raise CacheError(
                f"{config.features} holds imported features, which no network here can make again: compare finished "
                f"runs (`featcache compare {config.runs}/head {config.runs}/finetune`), or extract others with "
                f"--features OTHER.h5"
            )
        source, found = config.features, cache.provenance["settings"]
    elif is_run(finetune_run):
        source, found = str(finetune_run), read_record(finetune_run).settings
    if not found:
        return config
    adopted = {name: found[name] for name in names if name in found and getattr(config, name) in (None, ())}
    if adopted.get("backbone"):
        progress.say(f"backbone {adopted['backbone']}, as in {source}")
    return replace(config, **adopted)


def list_arms(config: CompareConfig) -> list[ArmPlan]:
    """The ways, in the order in which they were stated, for one backbone after the other."""
    backbones: tuple[str | None, ...] = config.backbones or (None,)
    return [arm for backbone in backbones for arm in list_arms_of(backbone, config, len(backbones) > 1)]


def list_arms_of(backbone: str | None, config: CompareConfig, several: bool) -> list[ArmPlan]:
    """Those of one backbone."""
    plain = make_source(backbone, config, several)
    arms = []
    for spelled in config.arms:
        kind, _, what = spelled.partition(":")
        name = spelled.replace(":", "-") + (f"-{make_slug(backbone)}" if several and backbone else "")
        if kind == "finetune":
            check_trainable(backbone or ExtractConfig.backbone)
            settings = {**config.stated("epochs", "batch_size", "lr"), **({"mode": what} if what else {})}
            settings |= list_images(plain, backbone)
            arms.append(ArmPlan(name=name, kind="finetune", source=plain, settings=settings))
            continue
        settings = {**config.stated("solver", "C"), **({"solver": what} if what else {})}
        if settings.get("solver") == "knn":
            settings.pop("C", None)
        if any(other.startswith("views") for other in config.arms):
            settings["views"] = kind == "views"
        source = add_views(plain, config) if kind == "views" else plain
        arms.append(ArmPlan(name=name, kind="head", source=source, settings=settings))
    return arms


def make_source(backbone: str | None, config: CompareConfig, several: bool) -> Source:
    """The plain features of a backbone."""
    path = locate(config.features)
    if several and backbone:
        path = name_cache(path, backbone, config.weights)
    stated = config.stated("weights", "val_fraction", "seed", "store", "workers")
    settings = {
        **({"backbone": backbone} if backbone else {}),
        **stated,
        **list_optional(path, backbone),
        "device": config.device,
        "skip_bad": config.skip_bad,
        "force": config.force,
    }
    return Source(path=path, settings=settings)


def add_views(plain: Source, config: CompareConfig) -> Source:
    """The features with augmented views: the same file if it has them, else one beside it that takes over its rows."""
    there = open_cache(plain.path).views.train if plain.path.is_file() else 0
    if there and config.views in (None, there):
        return plain
    path = plain.path.with_name(f"{plain.path.stem}-views{plain.path.suffix}")
    settings = plain.settings | {"views": config.views or (None if path.is_file() else DEFAULT_VIEWS)}
    return Source(path=path, settings=settings)


def list_optional(path: Place, backbone: str | None) -> dict[str, Any]:
    """Layers and image format of the cache that lies there, if it is of this backbone."""
    if not path.is_file():
        return {}
    found = open_cache(path).provenance["settings"]
    if found.get("backbone") != backbone:
        return {}
    return thaw(
        {name: found[name] for name in ExtractConfig.OPTIONAL if name in found and name not in VIEWS}  # which are kept
    )


def list_images(source: Source, backbone: str | None) -> dict[str, Any]:
    """What a network that is trained must see of an image, where it is not what belongs to its weights."""
    found = list_optional(source.path, backbone)
    return {name: value for name, value in found.items() if name in FinetuneConfig.IMAGES}


# --- what is there ----------------------------------------------------------------------------------------------------


def plan_comparison(
    data: Path | str,
    output: Path | str = f"{RUNS_DIR}/compare",
    *,
    progress: Progress = SILENT,
    **settings: Any,
) -> ComparisonPlan:
    """Say what `compare` would do, and about how long it would take. Writes nothing.

    How long the extraction and the fine-tuning take is measured on a few images. Parameters, errors as of `compare`.
    """
    return make_plan(data, Path(output), adopt_existing(CompareConfig(**settings), progress), progress)


def make_plan(data: Path | str, output: Path, config: CompareConfig, progress: Progress) -> ComparisonPlan:
    """The plan for settings that are settled."""
    arms, steps = list_arms(config), []
    looked: dict[Place, Plan] = {}
    described: dict[Place, dict[str, Any]] = {}
    for arm in arms:
        if arm.source.path not in looked:
            plan, forecast = forecast_extraction(data, arm.source.path, progress=progress, **arm.source.settings)
            looked[arm.source.path], described[arm.source.path] = plan, describe_data(plan.listing)
            state = "make" if plan.missing or plan.decision in ("create", "replace") else "reuse"
            expected = 0.0 if state == "reuse" else forecast.seconds
            steps.append(Step(what="extraction", place=arm.source.path, state=state, seconds=expected))
    speeds: dict[str, float | None] = {}
    for number in range(config.seeds):
        for arm in arms:
            seen = looked[arm.source.path]
            state = find_state(arm, number, config, described[arm.source.path], seen.extractor)
            seconds: float | None = 0.0
            if state != "reuse":
                if arm.name not in speeds:
                    speeds[arm.name] = estimate(arm, number, config, seen.listing, seen.width, progress)
                known = speeds[arm.name]
                seconds = known if known is None else known * (1 - find_share_done(arm, number, config, state))
            place = arm.name_folder(Path(config.runs), number)
            steps.append(Step(what=arm.kind, place=place, state=state, seconds=seconds, arm=arm.name, number=number))
    first = looked[arms[0].source.path]
    curve = estimate_curve(first.listing, first.width) if any(arm.kind == "head" for arm in arms) else 0.0
    report = REPORT_SECONDS + (curve if is_curve_wanted(config, curve) else 0.0)
    steps.append(Step(what="report", place=output, state="make", seconds=report))
    return ComparisonPlan(
        data=str(data), arms=tuple(arms), seeds=config.seeds, steps=tuple(steps), budget=config.budget
    )


def find_state(
    arm: ArmPlan, number: int, config: CompareConfig, data: Mapping[str, Any], extractor: Mapping[str, Any]
) -> str:
    """Whether the run of a seed is there, is half done, or is to be made."""
    if find_run(arm, number, config, data, extractor) is not None:
        return "reuse"
    folder = arm.name_folder(Path(config.runs), number)
    half_done = arm.kind == "finetune" and (name_checkpoint(folder) / "checkpoint.json").is_file()
    return "resume" if half_done else "make"


def find_run(
    arm: ArmPlan, number: int, config: CompareConfig, data: Mapping[str, Any], extractor: Mapping[str, Any]
) -> Path | None:
    """The run of a seed, if one lies there that fits and is whole.

    Raises
    ------
    RunError
        If it is damaged and `force` is not set.
    """
    folder = arm.name_folder(Path(config.runs), number)
    if not is_run(folder):
        return None
    try:
        record = read_record(folder)
        if not fits(record, list_wanted(arm, number, config), arm.kind, data, extractor):
            return None
        if is_cut(record):  # killed before it was set aside
            return None
        check_files(folder, record)
    except RunError as error:
        if config.force:
            return None
        raise RunError(f"{error}, or remove {folder}, or let --force make it again") from error
    return folder


def check_files(folder: Path, record: RunRecord) -> None:
    """Raise a RunError if a report cannot be made of what a run's folder holds."""
    for split in ("val", "test"):
        if split in record.accuracy:
            path = folder / name_predictions(split)
            predictions = read_predictions(path, record.classes)
            if len(predictions.paths) != record.accuracy[split]["n"]:
                raise RunError(
                    f"{path} has {len(predictions.paths)} predictions, expected "
                    f"{record.accuracy[split]['n']}; run it again"
                )
    if record.kind == "finetune":
        read_history(folder / "history.csv")


def is_cut(record: RunRecord) -> bool:
    """Whether a comparison's budget has cut this fine-tune short."""
    return record.details.get("budget_of") == BUDGET_OF


def list_wanted(arm: ArmPlan, number: int, config: CompareConfig) -> dict[str, Any]:
    """The settings that a run must have: those that are stated; of further seeds, those of the first one's run too."""
    seed = {"seed": config.seed} if config.seed is not None and arm.kind == "finetune" else {}
    if not number:
        return {**arm.settings, **seed}
    first = arm.name_folder(Path(config.runs), 0)
    if not is_run(first):
        return {**arm.settings, "seed": (config.seed or 0) + number}
    return make_recipe(read_record(first), number)


def make_recipe(first: RunRecord, number: int) -> dict[str, Any]:
    """The settings of the same training with another seed, on the same split."""
    settings = {name: value for name, value in first.settings.items() if name not in ("time_budget", "seed")}
    seed = int(first.settings.get("seed", 0))
    if first.kind == "finetune":
        settings.setdefault("split_seed", seed)
    return settings | {"seed": seed + number}


def fits(
    record: RunRecord, wanted: Mapping[str, Any], kind: str, data: Mapping[str, Any], extractor: Mapping[str, Any]
) -> bool:
    """Whether a run is of this kind, of these images and weights, and contradicts nothing that is wanted."""
    same = record.extractor["weights"]["tensors_sha256"] == extractor["weights"]["tensors_sha256"]
    if kind == "head":  # of these very features, and of all training images
        same = canonical_json(record.extractor) == canonical_json(extractor)
        same = same and not any(record.settings.get(name) for name in ("shots", "fraction"))
    return (
        record.kind == kind
        and same
        and record.data["fingerprints"] == data["fingerprints"]
        and all(record.settings.get(name) == plain(value) for name, value in wanted.items())
    )


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def thaw(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from JSON as they were stated."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


# --- how long it takes ------------------------------------------------------------------------------------------------


def estimate(
    arm: ArmPlan, number: int, config: CompareConfig, listing: Listing, width: int, progress: Progress
) -> float | None:
    """About how many seconds one training of an arm takes: as the first seed's did, or as a few steps say."""
    first = arm.name_folder(Path(config.runs), 0)
    if number and is_run(first):
        record = read_record(first)
        if record.kind == arm.kind and "time_budget" not in record.settings:
            return float(record.seconds["total"] - record.seconds.get("extraction", 0.0))
    if arm.kind == "head":
        return estimate_head(listing, width) * (1 + (arm.source.settings.get("views") or 0))
    progress.say(f"{arm.name}: a few steps, to see how long it takes")
    settings = finetune_settings(arm, 0, config) | {"features": str(arm.source.path)}
    try:
        return forecast_training(listing, FinetuneConfig(**settings), progress)
    except FeatcacheError as error:
        progress.say(f"{arm.name}: how long it takes is not known ({str(error).splitlines()[0]})")
        return None


def estimate_head(listing: Listing, width: int) -> float:
    """About how many seconds a linear head takes, its penalty chosen by cross-validation."""
    return HEAD_SECONDS + len(listing.splits["train"]) * width * len(listing.classes) / HEAD_RATE


def estimate_curve(listing: Listing, width: int) -> float:
    """About how many seconds its learning curve takes."""
    return CURVE_HEADS * (estimate_head(listing, width) - HEAD_SECONDS) + HEAD_SECONDS


def find_share_done(arm: ArmPlan, number: int, config: CompareConfig, state: str) -> float:
    """How much of a training that was interrupted is done."""
    if state != "resume":
        return 0.0
    found = read_checkpoint(arm.name_folder(Path(config.runs), number))
    if found is None:
        return 0.0
    identity = found["identity"]
    n = int(identity["epochs"]) + (int(identity.get("head_epochs", 1)) if identity["mode"] == "staged" else 0)
    return min(float(found["training"]["epoch"]) / n, 1.0)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What an interrupted run left, in words; None if there is nothing that can be read."""
    try:
        return Checkpoints(name_checkpoint(folder), {}, every_seconds=0).read()
    except RunError:
        return None


# --- settings of the stages -------------------------------------------------------------------------------------------


def head_settings(arm: ArmPlan, number: int, config: CompareConfig) -> dict[str, Any]:
    """For `train_head`."""
    if number:
        return thaw(list_wanted(arm, number, config))
    return {**arm.settings, **config.stated("seed")}


def finetune_settings(arm: ArmPlan, number: int, config: CompareConfig) -> dict[str, Any]:
    """For `finetune`."""
    machine = {
        **config.stated("workers"),
        "device": config.device,
        "skip_bad": config.skip_bad,
        "force": config.force,
    }
    if number:
        wanted = dict(list_wanted(arm, number, config))
        if wanted.pop("one_stream", False):
            machine["workers"] = 0
        return {**thaw(wanted), **machine}
    named = {"backbone": arm.source.settings["backbone"]} if "backbone" in arm.source.settings else {}
    return {**named, **arm.settings, **config.stated("weights", "val_fraction", "seed"), **machine}


def is_curve_wanted(config: CompareConfig, seconds: float) -> bool:
    """Whether the report has a learning curve, if it takes so long."""
    return seconds <= CURVE_SECONDS if config.curve is None else config.curve


# --- names ------------------------------------------------------------------------------------------------------------


def name_cache(features: Place | str, backbone: str, weights: str | None = None) -> Place:
    """The cache of a backbone: features-resnet18.h5 for features.h5 and resnet18; weights not its own are named.

    >>> name_cache("features.h5", "resnet18").name, name_cache("features.h5", "resnet18", "none").name
    ('features-resnet18.h5', 'features-resnet18-none.h5')
    """
    path, name = locate(features), make_slug(backbone)
    if weights not in (None, "default"):
        name = f"{name}-{make_slug(str(weights))}"
    return path.with_name(f"{path.stem}-{name}{path.suffix or '.h5'}")


def make_slug(text: str) -> str:
    """A name as part of a file's; one that had to be changed gets a digest, so that no two become the same.

    >>> make_slug("resnet18"), make_slug("timm:vit_tiny")
    ('resnet18', 'timm_vit_tiny-d4f01b')
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[-60:].lstrip("._")
    return slug if slug == text else f"{slug}-{hash_bytes(text.encode())[:6]}"
