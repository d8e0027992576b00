"""A web service that draws digits.

    pip install fastapi uvicorn
    python examples/serve.py  # or, in the folder of this file: uvicorn serve:app

Then http://127.0.0.1:8000/digits?labels=314&seed=0 is a picture, and http://127.0.0.1:8000/docs describes the rest.
"""

import io
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response

from mini_ddpm import load_pipeline, sample_grid


@asynccontextmanager
async def lifespan(app):
    """Open the pipeline before the first request. All threads use this one object."""
    app.state.pipe = load_pipeline("mnist-class-conditional")
    app.state.pipe.set_progress_bar_config(disable=True)
    yield


app = FastAPI(title="Digits", lifespan=lifespan)


@app.get("/health")
def health():
    """Say that the service is up."""
    return {"status": "ok"}


@app.get("/digits", response_class=Response, responses={200: {"content": {"image/png": {}}}})
def digits(
    request: Request,
    labels: Annotated[str, Query(pattern="^[0-9]{1,100}$", description="The digits, such as 314")],
    seed: Annotated[int, Query(ge=0, lt=2**63, description="The same seed gives the same picture")] = 0,
    steps: Annotated[int, Query(ge=1, le=100, description="Denoising steps")] = 20,
) -> Response:
    """Draw digits side by side. This is a `def`, no `async def`: FastAPI calls it in a thread for each request."""
    class_labels = [int(digit) for digit in labels]
    try:
        images = request.app.state.pipe(class_labels, num_inference_steps=steps, generator=seed).images
    except ValueError as error:  # another pipeline may know fewer classes
        raise HTTPException(400, str(error)) from error
    file = io.BytesIO()
    sample_grid(images, columns=len(images), scale=4).save(file, format="png")
    return Response(file.getvalue(), media_type="image/png")


def main(port=8000):
    """Serve on this machine until Ctrl-C."""
    uvicorn.run(app, port=port)


if __name__ == "__main__":
    main()
