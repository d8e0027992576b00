"""Opening, describing and publishing pipelines.

Opening: by bundled name, from a folder, from the Hub. Describing: a model card, rendered from facts and nothing else.
Publishing: in one commit, whole or not at all. What goes wrong is said in one line, with the original error as cause.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    errors,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .pipeline_mini_ddpm import CARD, PORTABLE_MODULE

logger = logging.get_logger(__name__)

# What a request without an answer raises: the error of httpx or of httpx2, by the client's version.
HTTPError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

# The file of a network's weights, or one of its shards; group 1 is the variant.
_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Names for the command line of schedulers that diffusers knows, ours among them once the package is imported.
SCHEDULERS = {
    "ddpm": "MiniDDPMScheduler",
    "ddim": "MiniDDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}

PRETRAINED = Path(__file__).parent / "pretrained"
"""The folder of the pipelines that ship with the package."""


def load_pipeline(name_or_path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Opens a pipeline of this package, of whichever class it was saved.

    Args:
        name_or_path: The name of a bundled pipeline (a folder in `PRETRAINED`; write `./mnist` for a folder of that
            name), a folder, or a repository on the Hub, "user/name".
        **kwargs: For `from_pretrained`: `dtype`, `revision`, `token`, `variant`, `local_files_only`, parts to replace
            such as `scheduler=` ... Weights are read from safetensors unless `use_safetensors=False` is given.

    Returns:
        The pipeline, of the installed class.

    Raises:
        OSError: The folder, a file in it or the repository is not there or cannot be read.
        ValueError: What is there is no pipeline of this package, or is damaged; the message names the file and,
            in a config, the key.
    """
    kwargs.setdefault("use_safetensors", True)
    folder = _find(str(name_or_path), kwargs)
    _check_folder(folder, kwargs)
    return DiffusionPipeline.from_pretrained(folder, **kwargs)


def _find(name: str, kwargs: dict[str, Any]) -> Path:
    """Returns the folder of a pipeline, downloaded if need be."""
    if is_bundled(name) or Path(name).is_dir():
        return local_folder(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise OSError(
            f"No pipeline {name!r}: it is not a folder, not a repository on the Hub (user/name),"
            f" and not bundled ({', '.join(_bundled()) or 'none are'})."
        )
    folder = Path(download(DiffusionPipeline, name, **kwargs))
    if damaged := _damaged(folder):
        raise OSError(
            f"{name}: {', '.join(damaged)} came damaged from the Hub, and is removed from the cache; load it again."
        )
    return folder


def _bundled() -> list[str]:
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model_index.json"))


def is_bundled(name: str) -> bool:
    """Whether a pipeline of this name ships with the package."""
    return name in _bundled()


def replace_scheduler(scheduler: Any, name: str) -> Any:
    """Makes the scheduler called `name` in `SCHEDULERS` from another one's configuration.

    Raises:
        ValueError: None is called so.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"--scheduler {name}: choose one of {', '.join(SCHEDULERS)}.")
    return getattr(diffusers, SCHEDULERS[name]).from_config(scheduler.config)


def guidance_of(
    pipe: Any, name: str, scale: float | None = None, interval: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Returns the guidance that a pipeline will be called with, as arguments of its call; none if it takes none.

    Args:
        pipe: The pipeline.
        name: What it is called in an error.
        scale: The guidance scale asked for. None: the pipeline's own.
        interval: The guidance interval asked for. None: the whole way.

    Raises:
        ValueError: Guidance was asked for, and the pipeline takes none; or the interval is none.
    """
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval={interval} must be two shares of the way, 0 <= start < end <= 1.")
    if "guidance_scale" not in inspect.signature(type(pipe).__call__).parameters:
        for key, value in (("guidance_scale", scale), ("guidance_interval", interval)):
            if value is not None:
                raise ValueError(f"{key}={value}: {name} is not class-conditional.")
        return {}
    options: dict[str, Any] = {
        "guidance_scale": float(pipe.config.get("default_guidance_scale", 1.5)) if scale is None else scale
    }
    return options | ({} if interval in (None, (0, 1)) else {"guidance_interval": interval})


def find_device(name: str) -> torch.device:
    """Returns the device called `name`: auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps.

    With auto each of the processes that `accelerate launch` starts has a GPU of its own.

    Raises:
        ValueError: The name is none of these, or there is no such device here.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        kind = next(kind for kind, there in found.items() if there)
        rank = os.environ.get("LOCAL_RANK")
        if kind == "cuda" and rank is not None:
            return torch.device(kind, int(rank) % torch.cuda.device_count())
        return torch.device(kind)
    kind, _, index = name.partition(":")
    if kind not in found or (index and not index.isdigit()):
        raise ValueError(f"--device {name}: choose auto, cpu, cuda, cuda:N or mps")
    if not found[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name}: PyTorch finds no such device here; --device cpu always works")
    return torch.device(name)


def local_folder(name_or_path: str | Path) -> Path:
    """Returns the folder of a bundled pipeline, or the folder that was given.

    Raises:
        OSError: There is no such folder.
    """
    folder = PRETRAINED / name_or_path if is_bundled(str(name_or_path)) else Path(name_or_path)
    if not folder.is_dir():
        raise OSError(f"There is no folder {name_or_path}.")
    return folder


_download = DiffusionPipeline.download.__func__


def download(cls: type[DiffusionPipeline], /, pretrained_model_name: str | Path, **kwargs: Any) -> Any:
    """Downloads a pipeline as `cls.download` of diffusers does, but fails in plain words."""
    with _plain_words(str(pretrained_model_name), kwargs.get("revision"), "Cannot download {} from the Hub: {}"):
        return _download(cls, pretrained_model_name, **kwargs)


def _damaged(folder: Path) -> list[str]:
    """Removes from the cache, and names, the files of a snapshot that are not what the Hub announced.

    The client compares sizes, not contents. But it names a cached file by the hash that the Hub announced for it:
    SHA-256 for large files, that of a git blob for the others. Where the cache has no links this finds nothing.
    """
    damaged = []
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink() and path.exists()):
        blob, content = link.resolve(), link.read_bytes()
        if len(blob.name) == 64:
            digest = hashlib.sha256(content).hexdigest()
        elif len(blob.name) == 40:
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        else:
            continue
        if digest != blob.name:
            damaged.append(link.relative_to(folder).as_posix())
            link.unlink()
            blob.unlink()
    return damaged


@contextlib.contextmanager
def _plain_words(name: str, revision: str | None, otherwise: str) -> Iterator[None]:
    """Turns what the client raises into an `OSError` of one line: what happened, and what to do.

    `otherwise` is the line for what has none of its own.
    """
    try:
        yield
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        # The host and the client wrap what the Hub said, sometimes twice, in "not fully cached locally".
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        raise OSError(_explain(name, causes, revision or "main", otherwise)) from error


def _explain(name: str, causes: list[BaseException], revision: str, otherwise: str) -> str:
    """Returns the line for an error of the client's."""
    answers = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
    status = {answer.response.status_code for answer in answers if not isinstance(answer, RepositoryNotFoundError)}
    if 401 in status:
        return (
            "The Hub does not know your token (HF_TOKEN, `token=` or that of an earlier `hf auth login`): log in anew,"
            f" or, if {name} is public, read it without a token: unset HF_TOKEN, `hf auth logout`, or `token=False`."
        )
    if 403 in status:
        return (
            f"Your token may not write to {name}: it needs the right to write"
            f" ({constants.ENDPOINT}/settings/tokens), and you to be a member of {name.partition('/')[0]}."
        )
    for kind, message in (
        (GatedRepoError, f"The repository {name} is gated: ask for access on its page, then `hf auth login`."),
        (
            RepositoryNotFoundError,
            f"No repository {name} on the Hub, or it is private and you are not logged in with access to it"
            " (`hf auth login`, or `token=`).",
        ),
        (RevisionNotFoundError, f"The repository {name} has no revision {revision!r}."),
        (HFValidationError, f"{name!r} is not a valid name of a repository on the Hub (user/name)."),
        (
            (LocalEntryNotFoundError, OfflineModeIsEnabled),
            f"The repository {name} (revision {revision!r}) is not in the local cache, and the Hub cannot be reached"
            " or was not to be asked.",
        ),
        (EntryNotFoundError, f"The repository {name} holds no pipeline: it has no model_index.json."),
    ):
        if any(isinstance(cause, kind) for cause in causes):
            return message
    if not answers and any(isinstance(cause, HTTPError) for cause in causes):
        reason = _first_line(causes[-1])
        return f"The connection to the Hub ({constants.ENDPOINT}) failed: {reason}. Check the network, and try again."
    return otherwise.format(name, _first_line(answers[0] if answers else causes[-1]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")


def _check_folder(folder: Path, kwargs: dict[str, Any]) -> None:
    """Raises for the first thing in a pipeline's folder that would fail obscurely, or pass and give bad images."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise OSError(f"{folder} is no pipeline: it has no model_index.json.")
    index = _read_config(index_file, DiffusionPipeline)
    name = index.get("_class_name")
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None or not pipeline_class.__module__.startswith("mini_ddpm."):
        raise ValueError(f"{index_file}: the pipeline's class is {name!r}, which is not one of this package.")
    _check_keys(index_file, index, pipeline_class)

    for part, value in index.items():
        if not isinstance(value, list) or part in kwargs:
            continue
        library, class_name = value
        part_class = getattr(diffusers, str(class_name), None)
        if library != "diffusers" or part_class is None:
            raise ValueError(f"{index_file}: the part {part!r} is of an unknown class, {class_name!r} of {library!r}.")
        config_file = folder / part / part_class.config_name
        if not config_file.is_file():
            raise OSError(f"{folder} is an incomplete pipeline: it has no {part}/{config_file.name}.")
        config = _read_config(config_file, part_class)
        _check_keys(config_file, config, part_class)
        if issubclass(part_class, diffusers.ModelMixin) and kwargs["use_safetensors"]:
            _check_weights(folder / part, config, part_class, kwargs.get("variant"))


def _read_config(file: Path, cls: Any) -> dict[str, Any]:
    """Reads a JSON object as `cls` does."""
    try:
        config = cls._dict_from_json_file(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return config


def _check_keys(file: Path, config: dict[str, Any], cls: Any) -> None:
    """Raises for a key that `cls` does not know, or lacks: a setting lost in silence gives a different model."""
    expected = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    known = expected.union({"quantization_config", "auto_map"}, cls.ignore_for_config)
    if cls.has_compatibles:  # a scheduler keeps the keys of those it was converted from
        known = known.union(*(inspect.signature(other.__init__).parameters for other in cls._get_compatibles()))
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    if unknown:
        raise ValueError(f"{file}: unknown key {unknown[0]!r}; {cls.__name__} has {', '.join(sorted(expected))}.")
    # Classes of diffusers gain keys with its versions; theirs may be absent, and so may defaults that nobody set.
    required = {key for key in expected if not key.startswith("default_")}
    missing = sorted(required - config.keys()) if cls.__module__.startswith("mini_ddpm.") else []
    if missing:
        raise ValueError(f"{file}: the key {missing[0]!r} is missing.")


def _check_weights(folder: Path, config: dict[str, Any], cls: Any, variant: str | None) -> None:
    """Raises for a weights file that is truncated or corrupt, or that is not of the network the config describes."""
    by_variant = _weights(folder)
    files = by_variant.get(variant) or by_variant.get(None)
    if not files:
        raise OSError(f"{folder} has no weights: no diffusion_pytorch_model.safetensors.")
    stored: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                stored |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupt ({error}); download or save it again.") from error
    with torch.device("meta"):
        network = cls.from_config(config)
    expected = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    for key in sorted(stored.keys() | expected.keys()):
        if stored.get(key) != expected.get(key):
            raise ValueError(
                f"{files[0]} does not fit {folder / cls.config_name}: the tensor {key} has the shape"
                f" {stored.get(key)} in the file and {expected.get(key)} in the network."
            )


def _weights(folder: Path) -> dict[str | None, list[Path]]:
    """Returns the files of a network's weights by variant, that without a name (None) first."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(file.name):
            found.setdefault(match[1], []).append(file)
    return dict(sorted(found.items(), key=lambda item: item[0] or ""))


# ---- The model card -----------------------------------------------------------------------------------------------

_TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
_SIGNATURE = "<!-- mini-ddpm rendered this card: {}. Once edited it is yours, and never overwritten. -->\n"
_PROTOCOL = {  # how the fields of an evaluation's record read in a table
    "num_images": "{:,} images",
    "num_inference_steps": "{} steps",
    "scheduler": "{}",
    "guidance_scale": "guidance {}",
    "guidance_interval": "from {0[0]:g} to {0[1]:g} of the way",
    "eta": "eta {}",
    "seed": "seed {}",
    "dtype": "{}",
    "note": "{}",
}


def read_facts(folder: Path) -> dict[str, Any]:
    """Gathers what is known of a pipeline from its folder; what is not known has no key.

    `model` comes from the configurations and the weights' headers. The rest comes from `facts.json`, which travels
    with the pipeline and may be edited (`license`, `description`, `limitations`: a text, a text, a list), and where a
    training run left its files from those: most of `training` from `train_config.json` and the last line of
    `train_log.jsonl`, `picture` from `samples.png` or the newest grid in `samples/`. `evaluation` comes from
    `evaluation.json`: what `mini-ddpm evaluate` wrote, or a list of records with `metric`, `value` and, each optional,
    `name`, `dataset`, `split`, `num_images`, `num_inference_steps`, `scheduler`, `guidance_scale`,
    `guidance_interval`, `eta`, `seed`, `dtype`, `note`.

    Raises:
        ValueError: A file is not what it should be.
    """
    facts = _model_facts(folder)
    if (folder / "facts.json").is_file():
        facts |= {key: value for key, value in _read_json(folder / "facts.json", dict).items() if key != "model"}
    if (folder / "train_config.json").is_file():
        facts["training"] = facts.get("training", {}) | _training_facts(folder)
    if (folder / "evaluation.json").is_file():
        file = folder / "evaluation.json"
        facts["evaluation"] = _evaluation_facts(_read_json(file, list), file)
    facts.pop("picture", None)
    if pictures := [*sorted(folder.glob("samples/epoch-*.png")), *folder.glob("samples.png")]:
        facts["picture"] = pictures[-1].relative_to(folder).as_posix()
    return facts


def _read_json(file: Path, kind: type) -> Any:
    if not file.is_file():
        raise OSError(f"{file.parent} is no pipeline: it has no {file.name}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} must hold a JSON {'list' if kind is list else 'object'}.")
    return content


def _model_facts(folder: Path) -> dict[str, Any]:
    index = _read_json(folder / "model_index.json", dict)

    def class_name(value: Any) -> Any:
        return value[-1] if isinstance(value, list) else value

    unet = _read_json(folder / "unet" / "config.json", dict)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", dict)
    model = {"pipeline": class_name(index["_class_name"]), "unet": class_name(index["unet"])}
    model |= {"scheduler": class_name(index["scheduler"])}
    for config, keys in (
        (unet, ("sample_size", "in_channels", "block_out_channels", "layers_per_block", "num_class_embeds")),
        (scheduler, ("num_train_timesteps", "beta_schedule", "prediction_type")),
    ):
        model |= {key: config[key] for key in keys if config.get(key) is not None}
    model |= {key: value for key, value in index.items() if key.startswith("default_")}
    if labels := index.get("id2label"):
        model["labels"] = list(labels.values())
    for files in list(_weights(folder / "unet").values())[:1]:
        count, dtypes = 0, set()
        for file in files:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    tensor = weights.get_slice(key)
                    count += int(torch.Size(tensor.get_shape()).numel())
                    dtypes.add({"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(tensor.get_dtype()))
        model |= {"parameters": count} | ({"dtype": dtype} if (dtype := dtypes.pop()) and not dtypes else {})
    return {"model": model}


def _training_facts(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "train_config.json", dict)
    keys = ["split", "learning_rate", "lr_scheduler", "ema_max_decay", "snr_gamma", "saturation_margin"]
    keys += ["mixed_precision", "seed", "guidance_scale"]  # the last where it was distilled in
    facts = {key: config[key] for key in keys if config.get(key) not in (None, "auto")}
    if config.get("guidance_interval", [0, 1]) != [0, 1]:
        facts["guidance_interval"] = config["guidance_interval"]
    if config.get("class_conditional"):
        facts["class_dropout_prob"] = config["class_dropout_prob"]
    for key, names in (
        ("dataset", "dataset_name"),
        ("started_from", "pretrained_model_name_or_path"),
        ("distilled_from", "distilled_from"),
    ):
        name = str(config.get(names))
        is_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
        if is_hub or (key != "dataset" and is_bundled(name)):  # a folder is nobody's business
            facts[key] = name
    log = folder / "train_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for line in lines[-1:]:
        with contextlib.suppress(json.JSONDecodeError):  # a killed run was writing it
            entry = json.loads(line)
            facts |= {"steps": entry["step"]} | {key: entry[key] for key in ("epoch", "images", "loss", "seconds")}
            facts["batch_size"] = entry["images"] // entry["step"]
    return facts


def _evaluation_facts(rows: list[Any], file: Path) -> list[dict[str, Any]]:
    """The records to show, of those in an `evaluation.json`: what `evaluate` wrote, or records of one figure each."""
    records = []
    for i, row in enumerate(rows):
        if isinstance(row, dict) and "protocol" in row:
            records += _figures(row, next((other for other in rows if other.get("images") == "real"), {}))
        elif (
            isinstance(row, dict) and isinstance(row.get("metric"), str) and isinstance(row.get("value"), (int, float))
        ):
            records.append(row)
        else:
            raise ValueError(f"{file}: record {i} needs a `metric` (a text) and a `value` (a number).")
    keys = ("metric", "name", "value", "dataset", "split", *_PROTOCOL)
    return [{key: record[key] for key in keys if key in record} for record in records]


def _figures(row: dict[str, Any], floor: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each figure of a row of `evaluate`'s that belongs on a card, beside that of real images."""
    if row["images"] == "real":
        return []
    protocol = row["protocol"]
    network = f"{protocol['feature_extractor']} in {protocol['feature_dtype']}"
    distance = f"against {protocol['reference_images']:,} real ones, {network}; real images: "
    records = []
    for key, metric, name, real, reading in (
        ("fid", "fid", "FID", distance, "{:.2f}"),
        ("frechet_distance", "frechet_distance", "Fréchet distance", distance, "{:.4g}"),
        ("class_accuracy", "accuracy", "Class accuracy", "read by a classifier, right on real images: ", "{:.2%}"),
        (
            "memorization",
            "memorization",
            "Memorization",
            "nearer to one trained on than it to others; unseen real images: ",
            "{:.1%}",
        ),
    ):
        if key in row:
            record = {**row, "metric": metric, "name": name, "value": row[key], "split": protocol["split"]}
            if "/" in protocol["dataset"]:  # a name on the Hub
                record["dataset"] = protocol["dataset"]
            if key in floor:
                record["note"] = real + reading.format(floor[key])
            records.append({key: value for key, value in record.items() if key != "eta" or value})
    return records


def render_card(facts: dict[str, Any]) -> str:
    """Renders the model card: metadata and text, of what `read_facts` found and of nothing else.

    Two more facts are known once a pipeline is published: `repo_id`, and `revision`, the commit that holds it.
    """
    model, training = facts["model"], facts.get("training", {})
    data = {"name": str(facts.get("repo_id") or model["pipeline"]).split("/")[-1], "dataset": training.get("dataset")}
    papers = ["2006.11239"]
    for paper, is_used in (
        ("2010.02502", "DDIM" in model["scheduler"]),
        ("2102.09672", model.get("beta_schedule") == "squaredcos_cap_v2"),
        (
            "2202.00512",
            model.get("prediction_type") == "v_prediction" or "default_num_inference_steps" in model,
        ),
        ("2207.12598", "num_class_embeds" in model),
        ("2303.09556", "snr_gamma" in training),
        ("2210.03142", model.get("default_guidance_scale") == 1),
    ):
        papers += [paper] * is_used
    evaluation = []
    for record in facts.get("evaluation", []):
        protocol = [text.format(record[key]) for key, text in _PROTOCOL.items() if record.get(key) is not None]
        is_share = record["metric"] in ("accuracy", "memorization")
        value = f"{record['value']:.2%}" if is_share else f"{record['value']:.4g}"
        dataset = record.get("dataset") or data["dataset"]
        name = record.get("name") or record["metric"]
        evaluation.append({**record, "name": name, "text": value, "dataset": dataset, "protocol": ", ".join(protocol)})
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Image generation",
            dataset_type=record["dataset"],
            dataset_name=record["dataset"],
            dataset_split=record.get("split"),
            metric_type=record["metric"],
            metric_name=f"{record['name']} ({record['protocol']})" if record["protocol"] else record["name"],
            metric_value=record["value"],
        )
        for record in evaluation
        if record["dataset"]  # the Hub wants one
    ]
    datasets = sorted({record["dataset"] for record in (*evaluation, data) if record["dataset"]})
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=facts.get("license"),
        datasets=datasets or None,
        tags=["mini-ddpm", "diffusion", "ddpm", "image-generation", *(f"arxiv:{paper}" for paper in papers)],
        **({"eval_results": results, "model_name": data["name"]} if results else {}),
    )
    context = {**data, "model": model, "training": training, "evaluation": evaluation, "papers": papers}
    context |= {key: facts.get(key) for key in ("picture", "repo_id", "revision", "license", "description")}
    context |= {"limitations": facts.get("limitations", [])}
    if size := model.get("sample_size"):
        height, width = size if isinstance(size, list) else (size, size)
        context["size"] = f"{width}×{height}"
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(context)
    card = str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text.strip()}\n\n"))
    return card + _SIGNATURE.format(_hash(card))


def _is_rendered(file: Path) -> bool:
    """Whether a card is as it was rendered, so that nothing is lost when another takes its place."""
    text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    card, mark, _ = text.partition(_SIGNATURE.partition("{")[0])
    return text == CARD or (mark != "" and text == card + _SIGNATURE.format(_hash(card)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_card(pipe: Any, folder: Path) -> None:
    """Writes `README.md` into a saved pipeline's folder, unless a person wrote the one that is there.

    What was recorded of the weights in the folder they were read from (training, evaluation, picture) goes along, as
    long as they are the same weights.
    """
    source = pipe._source_folder()
    if source is not None and source.resolve() != folder.resolve() and _holds_weights(source, pipe.unet):
        if source.parent.name == "snapshots" and not (source / "facts.json").exists():  # in the cache of the Hub
            _, *names = source.parents[1].name.split("--")
            with contextlib.suppress(OSError, HTTPError, HFValidationError):  # without a network there are less facts
                patterns = ["facts.json", "samples.png"]
                snapshot_download(
                    "/".join(names), revision=source.name, cache_dir=source.parents[2], allow_patterns=patterns
                )
        facts = read_facts(source)
        if "picture" in facts:
            shutil.copyfile(source / facts["picture"], folder / "samples.png")
            facts["picture"] = "samples.png"
        if facts.keys() - {"model", "repo_id", "revision"}:
            facts = {key: facts[key] for key in facts if key not in ("repo_id", "revision")} | _model_facts(folder)
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        theirs = source / "README.md"
        if theirs.is_file() and not _is_rendered(theirs) and not (folder / "README.md").exists():
            shutil.copyfile(theirs, folder / "README.md")
    card = folder / "README.md"
    if not card.is_file() or _is_rendered(card):
        card.write_text(render_card(read_facts(folder)), encoding="utf-8")


def export_card(folder: Path, facts: dict[str, Any], out: Path) -> None:
    """Writes the card of the pipeline in `folder` to `out`, with its facts and its picture."""
    out.mkdir(parents=True, exist_ok=True)
    facts = dict(facts)
    if "picture" in facts:
        shutil.copyfile(folder / facts["picture"], out / "samples.png")
        facts["picture"] = "samples.png"
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(render_card(facts), encoding="utf-8")


def _holds_weights(folder: Path, unet: torch.nn.Module) -> bool:
    """Whether a pipeline's folder holds the weights that a network has, in whatever precision."""
    state = unet.state_dict()
    for files in _weights(folder / "unet").values():
        stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
        if stored.keys() == state.keys() and all(
            torch.equal(tensor.to(state[key].dtype), state[key].cpu()) for key, tensor in stored.items()
        ):
            return True
    return False


# ---- Publishing ---------------------------------------------------------------------------------------------------


def push(
    name_or_path: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> CommitInfo:
    """Publishes a pipeline's folder as it is: all variants of its weights, byte for byte, and what describes them.

    What else lies there (checkpoints, logs) stays where it is. The arguments are those of `push_to_hub`.

    Raises:
        OSError: There is no such folder, or the Hub refused; nothing is then half published.
        ValueError: The folder is no pipeline, or is damaged.
    """
    with stage(name_or_path) as folder:
        return publish(
            folder,
            repo_id,
            commit_message=commit_message or f"Upload {Path(name_or_path).resolve().name}",
            private=private,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )


@contextlib.contextmanager
def stage(name_or_path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder with the files that `push` publishes."""
    source = local_folder(name_or_path)
    variant = next(iter(_weights(source / "unet")), None)
    pipe: Any = load_pipeline(source.resolve(), variant=variant)
    with tempfile.TemporaryDirectory() as target:
        folder = Path(target)
        for part in pipe.components:
            for file in (source / part).iterdir():
                if file.suffix in (".json", ".safetensors") and not file.name.startswith("."):
                    (folder / part).mkdir(exist_ok=True)
                    shutil.copyfile(file, folder / part / file.name)
        pipe.to_json_file(folder / "model_index.json")
        write_card(pipe, folder)
        yield folder


def publish(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Commits a saved pipeline to the Hub, all files at once, for `push` and for the pipelines' `push_to_hub`.

    Files of the repository that the new ones stand in for (older code, the same weights in other shards) go. A card
    that a person wrote stays. Ours names the commit that holds the pipeline, so it follows in a second commit.
    """
    if token is False or not (token or get_token()):
        raise OSError(
            f"To push to {repo_id} you must be logged in to the Hub: `hf auth login`, or a token with the right to"
            " write in HF_TOKEN or `token=`."
        )
    failed = "The Hub did not take {}: {}. Nothing is half published; push again to complete it."
    with _plain_words(repo_id, revision, failed):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        base = api.model_info(repo_id, revision=revision)
        there = {file.rfilename for file in base.siblings or ()}

        # 1. The card: theirs, or ours with the commit that it named so far.
        card, named = folder / "README.md", None
        if subfolder is None and card.name in there:
            theirs = Path(api.hf_hub_download(repo_id, card.name, revision=base.sha))
            if match := re.search(r'revision="([0-9a-f]{40})"', theirs.read_text(encoding="utf-8")):
                named = match[1]
            if not _is_rendered(theirs):
                logger.warning(f"{repo_id} has a model card that a person wrote or edited; it is kept as it is.")
                card.unlink()
        elif subfolder is not None:
            card.unlink()  # the repository's card is at its root
        is_ours = card.is_file() and _is_rendered(card)
        facts = {**read_facts(folder), "repo_id": repo_id}
        if is_ours:
            card.write_text(render_card({**facts, "revision": named}), encoding="utf-8")

        # 2. Everything in one commit. (`upload_folder` makes several of a large folder.)
        prefix = "" if subfolder is None else subfolder.strip("/") + "/"
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {prefix + path.relative_to(folder).as_posix(): path for path in paths}
        places = {_place(name) for name in files} - {None}
        stale = sorted(name for name in there - files.keys() if _place(name) in places)
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

        # 3. The name of that commit. Where nothing has changed, the card names the right one already.
        if is_ours and (commit.oid != base.sha or (named is None and not create_pr)):
            card.write_text(render_card({**facts, "revision": commit.oid}), encoding="utf-8")
            api.upload_file(
                path_or_fileobj=card,
                path_in_repo=card.name,
                repo_id=repo_id,
                commit_message="Name the commit to load in the model card",
                revision=commit.pr_revision or revision,
            )
    return commit


def _place(name: str) -> tuple[str, str, str | None] | None:
    """What a file of a repository is of which there can be but one: a folder's code, or its weights of one variant."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.rpartition(".")
    code = PORTABLE_MODULE.fullmatch(stem)
    if suffix == "py" and code is not None and code[2] is not None:
        return folder, "code", None
    index = re.fullmatch(r"diffusion_pytorch_model\.safetensors\.index(?:\.(\w+))?\.json", file)
    if match := index or _WEIGHTS.fullmatch(file):
        return folder, "weights", match[1]
    return None


def verify(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> tuple[str, int]:
    """Compares what the cache holds of a repository with the Hub's checksums; what differs is removed from the cache.

    Returns:
        The commit, and the number of files that are right.

    Raises:
        OSError: A file is damaged, or the Hub cannot be asked.
        ValueError: The cache holds nothing of the repository.
    """
    with _plain_words(repo_id, revision, "Cannot verify {}: {}"):
        try:
            found = HfApi(token=token).verify_repo_checksums(repo_id, revision=revision)
        except HFValidationError:
            raise
        except ValueError as error:
            raise ValueError(
                f"Nothing of {repo_id} (revision {revision or 'main'!r}) is in the cache to be verified: pull it"
                f" first, as `mini-ddpm sample {repo_id}` does."
            ) from error
    for mismatch in found.mismatches:
        file = found.verified_path / mismatch["path"]
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    if found.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in found.mismatches)
        raise OSError(
            f"{repo_id} is damaged in the cache: {names}. It is removed from there; load the pipeline again, and it is"
            " downloaded anew."
        )
    return found.revision, found.checked_count
