"""The page of ``pmf demo``: every control redraws the images, as one evaluation of the network suffices."""

import base64
import html
import math
import os
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmf import checkpoint
from pmf.defaults import normal
from pmf.errors import UserError
from pmf.flow.sampler import Sampler
from pmf.pictures import encode_png

__all__ = ["Request", "Studio", "build_page", "listen", "serve"]

_FRAMES, _FEWEST = 9, 3  # images from one seed to the other, most and fewest
_CLASSES = 10  # most classes drawn side by side
_AT_ONCE = (
    1.0  # seconds in which all images of the page can be drawn in one step, if that is enough for a few
)
_LARGEST_OMEGA = 8.0  # of the guidance slider, if the checkpoint does not record its training range
_MOST_STEPS, _LARGEST_SEED = 8, 999
_FEW = 12  # up to this many classes are buttons, more are a list
# Other sites cannot embed the page, and nothing is fetched from elsewhere: no fonts, scripts or counters.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
_STYLE = """
.pmf img { width: 100%; aspect-ratio: var(--shape); border-radius: 4px; display: block }
.pmf .small img { image-rendering: pixelated }
.pmf .large { max-width: 22rem }
.pmf .row { display: flex; gap: 0.4rem }
.pmf figure { flex: 1; margin: 0; min-width: 0 }
.pmf .row figure { max-width: 8rem }
.pmf figcaption { text-align: center; font-size: 0.8rem; overflow: hidden; text-overflow: ellipsis }
.pmf p { margin: 1rem 0 0.3rem }
input[type="radio"]:checked { background-color: var(--checkbox-background-color-selected) !important }
"""


class Request(NamedTuple):
    """The position of every control."""

    label: int = 0
    omega: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    steps: int = 1
    seed: int = 0
    other_seed: int = 1
    blend: float = 0.0


class Drawn(NamedTuple):
    """What the page shows, around [-1, 1], and the seconds it took."""

    image: Tensor  # the requested one [C, H, W]
    between: Tensor  # the class from one seed to the other in equal steps [frames, C, H, W]
    classes: Tensor  # the noise of the image as each class [classes, C, H, W]
    seconds: float


class Studio:
    """A checkpoint, and how many images of it are drawn at once."""

    def __init__(self, loaded: checkpoint.LoadedModel, device: torch.device, precision: str = "auto") -> None:
        self.sampler = Sampler(loaded.model.to(device), precision)
        self.names = loaded.class_names
        self.config = loaded.model.config
        settings = checkpoint.trained_settings(loaded.path).get("objective")
        settings = settings if isinstance(settings, dict) else {}
        self.is_guided = len(self.names) > 1 and settings.get("guidance") is not False
        found = settings.get("max_omega")
        largest = float(found) if isinstance(found, (int, float)) else _LARGEST_OMEGA
        self.largest_omega = max(largest, self.config.sample_omega)
        self.fastest = math.inf  # seconds of one evaluation of one image, the least so far
        for _ in range(2):  # the first is slower
            self.draw(self.first())

    @property
    def frames(self) -> int:
        """How many images are drawn from one seed to the other."""
        return min(_FRAMES, max(_FEWEST, int(_AT_ONCE / self.fastest)))

    @property
    def num_classes(self) -> int:
        """How many classes are drawn side by side: all, if they are few and the network is fast, or none."""
        room = min(_CLASSES, int(_AT_ONCE / self.fastest) - self.frames)
        return len(self.names) if 1 < len(self.names) <= room else 0

    def first(self) -> Request:
        """What the page shows first: the checkpoint's own guidance."""
        low, high = self.config.sample_interval
        omega = self.config.sample_omega if self.is_guided else 1.0
        return Request(omega=omega, t_min=low, t_max=high)

    def draw(self, request: Request) -> Drawn:
        """Draw everything in one batch; UserError if memory runs out."""
        frames, num_classes = self.frames, self.num_classes
        blends = [request.blend, *(i / (frames - 1) for i in range(frames))]
        noise = self.noise(request.seed, request.other_seed, blends)
        noise = torch.cat((noise, noise[:1].expand(num_classes, -1, -1, -1)))
        labels = [request.label] * len(blends) + list(range(num_classes))
        interval = min(request.t_min, request.t_max), max(request.t_min, request.t_max)
        start = time.perf_counter()
        try:
            images = self.sampler(labels, request.steps, request.omega, interval, noise).cpu()
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error).splitlines()[0]) from error
        seconds = time.perf_counter() - start
        self.fastest = min(self.fastest, seconds / (len(images) * request.steps))
        return Drawn(images[0], images[1 : 1 + frames], images[1 + frames :], seconds)

    def noise(self, seed: int, other: int, blends: Sequence[float]) -> Tensor:
        """Noise [N, C, H, W] interpolated between two seeds, e cos(b pi / 2) + e' sin(b pi / 2).

        A mixture of independent normal numbers with these weights is normal with the same variance.
        """
        shape, scale = self.config.image_shape, self.config.noise_scale
        one, two = (
            scale * normal(*shape, generator=torch.Generator("cpu").manual_seed(s)) for s in (seed, other)
        )
        if seed == other:  # not independent: nothing to interpolate
            return one.expand(len(blends), -1, -1, -1)
        return torch.stack(
            [math.cos(b * math.pi / 2) * one + math.sin(b * math.pi / 2) * two for b in blends]
        )

    def page(self, request: Request) -> str:
        """The images of a request as HTML, embedded."""
        drawn = self.draw(request)
        image, *_ = _sources(drawn.image[None])
        name = self.names[request.label]
        class_words = f"class {name}, " if len(self.names) > 1 else ""
        seeds = f"seed {request.seed}"
        if request.blend > 0 and request.other_seed != request.seed:
            seeds += f" to {request.other_seed} at {request.blend:.2f}"
        evaluations = f"{request.steps} evaluation" + ("s" if request.steps > 1 else "")
        caption = f"{class_words}{seeds}, {evaluations} of the network"
        parts = [f'<div class="large">{_figure(image, caption, caption)}</div>']
        ends = f"from seed {request.seed} to {request.other_seed}"
        between = _sources(drawn.between)
        parts.append(f'<p>From seed {request.seed} to seed {request.other_seed}</p><div class="row">')
        parts += [_figure(x, f"{i + 1} of {len(between)} {ends}") for i, x in enumerate(between)]
        parts.append("</div>")
        if len(drawn.classes):
            parts.append('<p>The same noise in every class</p><div class="row">')
            classes = zip(_sources(drawn.classes), self.names, strict=True)
            parts += [_figure(x, f"class {name}", name) for x, name in classes]
            parts.append("</div>")
        count = 1 + len(drawn.between) + len(drawn.classes)
        parts.append(f"<p>{count} images in {1000 * drawn.seconds:.0f} ms</p>")
        _, height, width = self.config.image_shape
        size = "small" if max(height, width) < 256 else ""
        style = f'class="{size}" style="--shape: {width} / {height}"'
        return f'<div class="pmf"><div {style}>{"".join(parts)}</div></div>'


def _sources(images: Tensor) -> list[str]:
    """Images [N, C, H, W] as URLs that contain them."""
    return ["data:image/png;base64," + base64.b64encode(encode_png(image)).decode() for image in images]


def _figure(source: str, alt: str, caption: str | None = None) -> str:
    below = "" if caption is None else f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure><img src="{source}" alt="{html.escape(alt)}">{below}</figure>'


def build_page(studio: Studio, title: str) -> Any:
    """The Gradio page, not yet served; raises UserError without Gradio."""
    gradio = _import_gradio()
    first = studio.first()

    def redraw(*values: Any) -> str:
        values = tuple(value or 0 for value in values)  # an emptied number field is None
        try:
            return studio.page(Request(*values))
        except UserError as error:
            raise gradio.Error(str(error)) from error

    def slider(label: str, low: float, high: float, value: float, step: float, **more: Any) -> Any:
        return gradio.Slider(low, high, value, step=step, label=label, **more)

    with gradio.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(f"<h2>{html.escape(title)}</h2>")  # a folder's name: neither Markdown nor markup
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                choices = [(name, index) for index, name in enumerate(studio.names)]
                pick = gradio.Radio if len(choices) <= _FEW else gradio.Dropdown
                guided = studio.is_guided
                controls = [
                    pick(choices, value=0, label="Class", visible=len(choices) > 1),
                    slider("Guidance", 1.0, studio.largest_omega, first.omega, 0.05, visible=guided),
                    slider("Guidance from t =", 0.0, 1.0, first.t_min, 0.01, visible=guided),
                    slider("Guidance to t =", 0.0, 1.0, first.t_max, 0.01, visible=guided),
                    slider("Steps", 1, _MOST_STEPS, first.steps, 1),
                    slider("Seed", 0, _LARGEST_SEED, first.seed, 1),
                    slider("Other seed", 0, _LARGEST_SEED, first.other_seed, 1),
                    slider("Between the seeds", 0.0, 1.0, first.blend, 0.01),
                ]
            with gradio.Column(scale=2, min_width=320):
                images = gradio.HTML(studio.page(first))
        # always_last: while images are drawn, only the newest position of a moving slider waits.
        gradio.on(
            [control.change for control in controls],
            redraw,
            inputs=controls,
            outputs=images,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
    return page


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded; UserError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"cannot listen on port {port} of {host} ({getattr(error, 'strerror', None) or error}): "
            "give another --port, or --port 0 for any that is free"
        ) from error
    return listener


def serve(page: Any, listener: socket.socket) -> None:
    """Answer browsers until Ctrl-C."""
    gradio = _import_gradio()
    import fastapi
    import uvicorn

    fonts = ["system-ui", "sans-serif"]
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        ssr_mode=False,
        theme=gradio.themes.Default(font=fonts, font_mono=["monospace"]),
        css=_STYLE,
    )
    config = uvicorn.Config(
        _with_policy(app), log_level="warning", timeout_graceful_shutdown=1, lifespan="on"
    )
    uvicorn.Server(config).run(sockets=[listener])


def _with_policy(app: Any) -> Any:
    """The application, with the content security policy in the header of every answer."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await app(scope, receive, send_with_policy)

    return answer


def _import_gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError("pmf demo needs Gradio, which is not installed: pip install 'gradio>=6'") from error
    return gradio
