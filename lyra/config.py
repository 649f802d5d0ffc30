"""Settings of a job and of a model family, as frozen dataclasses that read and write JSON.

Every option of the command line is a field of `GenerateJob`, so a saved job repeats a run. Knows no stage: the stages
read these values and decide nothing by a model's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lyra.errors import UserError

CHUNK_FRAMES = 80
"""New frames of one autoregressive step (paper section 4; 20 latents of 4 frames)."""

RECIPE_CHUNKS = {"zoom-in-zoom-out": 4}
"""Presets that are several walks from one photo, and the chunks that they always have together."""

MAX_CHUNKS = 6
"""Longest walkthrough that the app offers, in chunks."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is put together and on a machine; none of it changes what the model is asked for."""

    depth: str | None = None
    """Depth network instead of the model's own: da3-small or da3-base (Apache-2.0, downloaded), or a folder of public
    Depth Anything 3 weights."""
    device: str | None = None
    """cpu or cuda; by default cuda where there is one."""
    weights: Literal["bf16", "fp8", "nf4", "fp32"] | None = None
    """Number format of the transformer's weights; with --offload, the best that fits by default."""
    offload: Literal["none", "model", "group"] | None = None
    """none: all networks stay on the GPU; model: one at a time; group: the transformer's blocks are streamed."""
    decode: Literal["streamed", "tiled"] | None = None
    """streamed: whole frames, latent by latent; tiled: in less memory, with seams of the tiles blended."""
    fuse_loras: bool = False
    """Add LoRAs (also the 4-step sampler's) to the weights: faster, for as much host memory as the weights take."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dump; they are also the keyword arguments of `LyraPipeline.from_pretrained`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> LoadOptions:
        """Options from `to_json`'s values; what is not known is left to the machine."""
        given = values if isinstance(values, dict) else {}
        return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})


@dataclass(frozen=True)
class GenerateJob:
    """One walkthrough: everything that decides its bytes, apart from the weights and the device."""

    photo: str
    """Path of the photo."""
    preset: str = "push-in"
    """Camera preset; ignored when `trajectory` is given."""
    trajectory: str | None = None
    """Path of a trajectory.npz (w2c, intrinsics, image_height, image_width) or of a camera path JSON of the released
    interface, instead of a preset."""
    strength: float = 1.0
    """Scale of the preset's motion; 1 is a comfortable move."""
    chunks: int = 1
    """Number of 80-frame chunks, 1 to 6."""
    sampler: Literal["dmd", "full"] = "dmd"
    """`dmd`: 4 distilled steps without guidance; `full`: UniPC with guidance."""
    steps: int = 35
    """Denoising steps of the full sampler."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the full sampler; the model's own where none is given."""
    memory: Literal["lyra", "none"] = "lyra"
    """`lyra`: retrieve remembered frames by coverage; `none`: only the temporal history."""
    model: str = "lyra-tiny"
    """A model name or a folder of weights."""
    prompt: str = ""
    """What the walkthrough shows."""
    captions: str | None = None
    """Path of a captions.json, {"0": ..., "81": ...}, one caption from each frame on; each walk of a recipe
    starts at 0."""
    seed: int = 0
    """Noise seed; chunk k of a walk uses seed + k."""
    resolution: Literal["480x832", "448x768"] = "480x832"
    """Height and width of a landscape video; portrait swaps them, square has as many pixels."""
    pose_scale: float | None = None
    """Factor on the translations of a path from a file; the model's own where none is given (released: 1.1)."""
    retrieval_views: int = 1
    """New views that the memory is scored on: the chunk's last one, or so many spread over it (released: 1)."""
    loras: tuple[str, ...] = ()
    """Further LoRA files with their strengths, as PATH=0.4."""
    captioner: str | None = None
    """A vision-language model that captions each new chunk, such as Qwen/Qwen3-VL-4B-Instruct; off by default."""

    def __post_init__(self) -> None:
        # Lists come from JSON; a job is hashable and comparable.
        object.__setattr__(self, "loras", tuple(self.loras))
        if not isinstance(self.seed, int):
            raise UserError(f"--seed is '{self.seed}'; choose a whole number.")
        if self.trajectory is None and self.preset in RECIPE_CHUNKS:
            object.__setattr__(self, "chunks", RECIPE_CHUNKS[self.preset])
        if self.resolution not in ("480x832", "448x768"):
            raise UserError(f"--resolution is '{self.resolution}'; choose 480x832 or 448x768.")
        if not 1 <= self.retrieval_views <= CHUNK_FRAMES:
            raise UserError(
                f"--retrieval-views is {self.retrieval_views}; choose a whole number from 1 to {CHUNK_FRAMES}."
            )
        if self.pose_scale is not None and not 0.0 < self.pose_scale <= 100.0:
            raise UserError(f"--pose-scale is {self.pose_scale}; choose a number above 0, up to 100.")
        self.lora_strengths()
        if not 1 <= self.chunks <= MAX_CHUNKS:
            raise UserError(f"--chunks is {self.chunks}; choose a whole number from 1 to {MAX_CHUNKS}.")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"--steps is {self.steps}; choose a whole number from 1 to 1000.")
        if not 0.0 <= self.strength <= 3.0:
            raise UserError(f"--strength is {self.strength}; choose a number from 0 to 3.")
        if self.sampler not in ("dmd", "full"):
            raise UserError(f"--sampler is '{self.sampler}'; choose dmd (4 steps) or full (35 steps).")
        if self.memory not in ("lyra", "none"):
            raise UserError(f"--memory is '{self.memory}'; choose lyra or none.")

    @property
    def frames(self) -> int:
        """Frames of the finished video: the photo and 80 per chunk."""
        return 1 + CHUNK_FRAMES * self.chunks

    def lora_strengths(self) -> dict[str, float]:
        """Strength of each further LoRA by its path.

        Raises:
            UserError: an entry is not PATH=STRENGTH.
        """
        strengths = {}
        for entry in self.loras:
            path, _, number = entry.rpartition("=")
            try:
                strengths[path] = float(number)
            except ValueError:
                path = ""
            if not path or not -10.0 <= strengths[path] <= 10.0:
                raise UserError(f"--loras has '{entry}'; write a path and a strength, such as style.safetensors=0.4.")
        return strengths

    def guidance(self, settings: ModelSettings) -> float:
        """The job's guidance, or the model's own where the job gives none."""
        return settings.guidance_scale if self.guidance_scale is None else self.guidance_scale

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dump."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GenerateJob:
        """A job from `to_json`'s values.

        Raises:
            UserError: a field is unknown or the photo is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"The job has unknown fields ({', '.join(unknown)}); remove them or update this program.")
        if "photo" not in values:
            raise UserError("The job names no photo; add a field 'photo' with the path of an image.")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"A field of the job has a value of the wrong kind ({error}); correct it.") from error

    @classmethod
    def load(cls, path: Path) -> GenerateJob:
        """A job from a JSON file, or from the `job` entry of a run.json.

        Raises:
            UserError: the file cannot be read or is not a job.
        """
        values = read_json_file(path)
        if isinstance(values.get("job"), dict):
            values = values["job"]
        return cls.from_json(values)


FormatName = Literal["ply", "spz", "splat", "glb-splats", "glb", "obj", "usd", "usdz", "colmap", "nerfstudio", "frames"]
"""Formats that a world can be written in; `lyra.exporting` says what each is."""


@dataclass(frozen=True)
class ReconstructJob:
    """How a walkthrough becomes splats."""

    reconstructor: Literal["geometric", "lyra-tiny", "depth-anything"] | None = None
    """geometric: discs on the measured depth; lyra-tiny: the same, changed by the default model's Gaussian head;
    depth-anything: the Gaussian head of Depth Anything 3. By default that network where the world's model has it, and
    lyra-tiny elsewhere."""
    model: str | None = None
    """The model or folder whose Depth Anything 3 lifts; by default the one that made the world."""
    poses: Literal["commanded", "estimated"] = "commanded"
    """commanded: the cameras that the video was asked for; estimated: cameras found in the video itself."""
    interval: int = 8
    """geometric and lyra-tiny lift every n-th frame whose depth was measured, besides the photo and the last one."""
    chunks: int | None = None
    """Depth Anything 3 sees a long video in so many overlapping chunks; by default what the length asks for."""

    def __post_init__(self) -> None:
        if self.reconstructor not in (None, "geometric", "lyra-tiny", "depth-anything"):
            raise UserError(
                f"--reconstructor is '{self.reconstructor}'; choose geometric, lyra-tiny or depth-anything."
            )
        if self.poses not in ("commanded", "estimated"):
            raise UserError(f"--poses is '{self.poses}'; choose commanded or estimated.")
        if self.interval < 1:
            raise UserError(f"--interval is {self.interval}; choose a whole number from 1.")


@dataclass(frozen=True)
class MeshJob:
    """How splats become a surface and a collider."""

    triangles: int = 200_000
    """Most triangles of the coloured surface."""
    collider_triangles: int = 20_000
    """Most triangles of the collider."""
    voxel: float | None = None
    """Edge of a voxel near the cameras, in scene units; by default as fine as the video is and memory allows."""

    def __post_init__(self) -> None:
        for name, value in (("--triangles", self.triangles), ("--collider-triangles", self.collider_triangles)):
            if not 100 <= value <= 20_000_000:
                raise UserError(f"{name} is {value}; choose a whole number from 100 to 20,000,000.")
        if self.voxel is not None and not 1e-4 <= self.voxel <= 100:
            raise UserError(f"--voxel is {self.voxel}; choose a number from 0.0001 to 100 scene units.")


def read_json_file(path: Path) -> dict[str, Any]:
    """The object in a job JSON or run.json.

    Raises:
        UserError: the file cannot be read or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"The job file {path} cannot be read as JSON ({error}); check its path and content.") from error
    if not isinstance(values, dict):
        raise UserError(f"The job file {path} holds no JSON object; save one from a run.json or with to_json().")
    return values


@dataclass(frozen=True)
class ModelSettings:
    """What a model family asks of the loop; stored as `lyra.json` beside its weights."""

    name: str
    """Shown to users."""
    licence: str
    """Licence of the weights, as a short name."""
    generation_height: int | None
    """Height in pixels at which the network works for a landscape photo; None means the output's own."""
    generation_width: int | None
    keep_seen_pixels: bool
    """Pixels that the memory sees are warped at output resolution and kept; the network fills the rest."""
    fill_holes: bool
    """Holes of the appearance warp are filled from their surroundings before encoding (released: left black)."""
    visibility_mask: bool
    """The mask channels say which target pixels the warp covers (released: ones everywhere)."""
    few_step_note: str
    """How the 4-step sampler's weights were distilled, for the label of the toggle."""
    flow_shift: float = 5.0
    """Time shift of the sampling schedule (released: 5)."""
    guidance_scale: float = 5.0
    """Default guidance of the full sampler."""
    spatial_memory_stride: int = 8
    """Every n-th frame enters the memory (released: 8)."""
    warp_group: int = 16
    """Targets warped together; the depth weights share a maximum within a group (released: 16)."""
    depth_interval: int = 8
    """Depth of new frames is measured at every n-th, counted back from the last (released: 8)."""
    depth_frames: int = 10
    """At most so many frames are measured after a chunk (released: 10)."""
    part_licences: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Id of each part's licence, where the parts have several; `licence` is the strictest."""
    few_step_lora: bool = False
    """The 4-step sampler's weights are a LoRA beside the transformer (released: they are)."""
    pose_scale: float = 1.0
    """Default factor on the translations of a camera path from a file (released: 1.1)."""

    @classmethod
    def load(cls, folder: Path) -> ModelSettings:
        """Settings of the weights in a folder.

        Raises:
            UserError: the folder holds no readable lyra.json.
        """
        path = folder / "lyra.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise UserError(
                f"{folder} holds no readable lyra.json ({error}); point --model at a folder of weights."
            ) from error


RELEASED_SETTINGS = ModelSettings(
    name="nvidia/Lyra-2.0",
    licence="NVIDIA Internal Scientific Research and Development Model License",
    generation_height=None,
    generation_width=None,
    keep_seen_pixels=False,
    fill_holes=False,
    visibility_mask=False,
    few_step_note="NVIDIA's DMD distillation, a LoRA with guidance distilled in",
    few_step_lora=True,
    pose_scale=1.1,
)
"""What the released weights ask of the loop (released code's defaults)."""
