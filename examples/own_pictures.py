"""Pictures of your own become a class-conditional pipeline, and go to the Hub if you name a repository.

    python examples/own_pictures.py path/to/pictures --repo-id user/my-pictures

trains on `path/to/pictures/CLASS/*.png` (or .jpg and others) and writes the pipeline to `runs/own-pictures`, with a
grid of samples, `samples.png`. Without `--repo-id` nothing is pushed. To push, log in first: `hf auth login`.
"""

import argparse
from pathlib import Path
from typing import Any

from mini_ddpm import TrainConfig, load_pipeline, sample_grid, train


def main(
    pictures: str | Path,
    repo_id: str | None = None,
    output_dir: str | Path = "runs/own-pictures",
    resolution: int | None = 32,
    max_train_steps: int = 3000,
    rows: int = 8,
    **settings: Any,
) -> Path:
    """Train, draw `rows` samples of each class, and push; return the folder. `settings` are those of `TrainConfig`."""
    config = TrainConfig(
        dataset_name=str(pictures),  # each sub-folder is a class
        output_dir=Path(output_dir),
        class_conditional=True,
        resolution=resolution,  # crop to the centre square and resize; None keeps the size
        max_train_steps=max_train_steps,
        **settings,
    )
    folder = train(config)  # resumes if the same command was interrupted

    pipe = load_pipeline(folder)
    names = list(pipe.config.id2label.values())
    images = pipe(names * rows, generator=0).images  # a class is given by its label or by its name
    sample_grid(images, names * rows, columns=len(names)).save(folder / "samples.png")
    print(f"{folder / 'samples.png'}: {rows} samples of each class: {', '.join(names)}")

    if repo_id is not None:
        commit = pipe.push_to_hub(repo_id)  # weights, code, model card
        print(f'{commit}\nload_pipeline("{repo_id}") opens it.')
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="folder of pictures, one sub-folder per class")
    parser.add_argument("--repo-id", help="repository on the Hub, user/name; default: push nothing")
    parser.add_argument("--output-dir", default="runs/own-pictures")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--max-train-steps", type=int, default=3000)
    main(**vars(parser.parse_args()))
