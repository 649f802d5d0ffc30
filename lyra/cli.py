"""The command line: `python -m lyra generate | reconstruct | mesh | fly-through | export | convert | doctor`.

Parses, prints progress and turns a user's mistakes into one line and an exit code; all work is the pipeline's.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lyra.config import FormatName, GenerateJob, LoadOptions, MeshJob, ReconstructJob, read_json_file
from lyra.errors import UserError
from lyra.progress import Cancelled, Progress, Status

USER_ERROR_CODE = 2
CANCELLED_CODE = 130


@dataclass(frozen=True)
class JobOptions(GenerateJob):
    """A job whose photo is given by position."""

    photo: tyro.conf.Positional[str] = ""
    """Path of the photo; may be left out with --job or --resume."""


@dataclass(frozen=True)
class Generate:
    """Make a walkthrough video from a photo, in a world folder."""

    options: Annotated[JobOptions, tyro.conf.arg(name="")]
    out: Path
    """World folder; finished chunks in it are used again."""
    job: Path | None = None
    """A job JSON or run.json whose settings are used where the command line gives none."""
    resume: bool = False
    """Go on with the job of the folder's run.json."""
    load: LoadOptions = field(default_factory=LoadOptions)
    accept_licence: bool = False
    """Accept the licence of gated weights, which is printed; remembered with the date."""

    def run(self) -> None:
        """Generate; under torchrun, the first process does so and the others help it."""
        from lyra.hub import find_depth
        from lyra.models.context_parallel import context_parallel
        from lyra.pipeline import LyraPipeline

        job = GenerateJob(**{f.name: getattr(self.options, f.name) for f in fields(GenerateJob)})
        if not job.photo:
            raise UserError("No photo is given; write its path after `generate`, or use --job FILE or --resume.")
        progress = Progress(listener=print_status)
        if self.accept_licence:
            accept_licences(job.model, progress)
            if self.load.depth is not None:
                accept_licences(self.load.depth, progress, find=find_depth)
        with context_parallel(self.load.device) as group:
            if group.is_worker:
                return LyraPipeline.serve(job.model, group, device=self.load.device)
            pipeline = LyraPipeline.from_pretrained(job.model, progress=progress, group=group, **self.load.to_json())
            world = pipeline.generate(job, self.out, progress)
        note = world.run.get("path_note")
        finish_line(f"{world.video_path} is finished." + (f" {note}" if note else ""))


@dataclass(frozen=True)
class Reconstruct:
    """Lift a world's walkthrough to Gaussian splats (scene.ply, scene.spz)."""

    world: tyro.conf.Positional[Path]
    job: ReconstructJob = field(default_factory=ReconstructJob)
    load: LoadOptions = field(default_factory=LoadOptions)
    accept_licence: bool = False
    """Accept the licence of gated weights, which is printed; remembered with the date."""

    def run(self) -> None:
        """Reconstruct."""
        from lyra.hub import find_depth
        from lyra.lifting import reconstruct
        from lyra.reconstructors import reconstructor_for, resolve
        from lyra.world import World

        world, progress = World.open(self.world), Progress(listener=print_status)
        if self.accept_licence and self.job.model is not None:
            accept_licences(self.job.model, progress, find=find_depth)
        job = resolve(world, self.job)
        scene = reconstruct(world, job, reconstructor_for(world, job, self.load, progress), progress)
        note = world.run["reconstruct"].get("pose_note")
        finish_line(f"{world.scene_path} has {len(scene):,} splats." + (f" {note}" if note else ""))


@dataclass(frozen=True)
class Mesh:
    """Make a coloured surface (mesh.glb) and a collider (collider.obj) of a world's splats."""

    world: tyro.conf.Positional[Path]
    job: MeshJob = field(default_factory=MeshJob)

    def run(self) -> None:
        """Mesh."""
        from lyra.lifting import mesh
        from lyra.world import World

        world = World.open(self.world)
        surface = mesh(world, self.job, Progress(listener=print_status))
        collider = world.run["mesh"]["collider_triangles"]
        finish_line(f"{world.mesh_path} has {len(surface.faces):,} triangles, {world.collider_path} {collider:,}.")


@dataclass(frozen=True)
class FlyThrough:
    """Render a video of a world's splats along its own path or another one."""

    world: tyro.conf.Positional[Path]
    out: Path | None = None
    """The video; by default fly-through.mp4 in the world's folder."""
    trajectory: Path | None = None
    """A trajectory.npz (w2c, intrinsics, image_height, image_width) in the world's axes; by default its cameras.npz."""

    def run(self) -> None:
        """Render."""
        from lyra.generation.chunk_store import writing_to
        from lyra.lifting import read_scene
        from lyra.reconstruction.fly_through import write_fly_through
        from lyra.trajectory.files import read_trajectory
        from lyra.world import World

        world, progress = World.open(self.world), Progress(listener=print_status)
        cameras = world.cameras if self.trajectory is None else read_trajectory(self.trajectory)
        scene, target = read_scene(world), self.out or world.folder / "fly-through.mp4"
        progress.enter("Render")
        with writing_to(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_fly_through(scene, cameras, target, check=progress.step)
        finish_line(f"{target} has {len(cameras)} frames.")


@dataclass(frozen=True)
class Export:
    """Write a world in other formats into its exports folder."""

    world: tyro.conf.Positional[Path]
    formats: tuple[FormatName, ...] = ("ply", "spz", "glb", "usd")
    """ply, spz, splat, glb-splats: splats; glb, obj: surface; usd, usdz: splats, collider and physics for simulators;
    colmap, nerfstudio: frames for trainers; frames: the frames, cameras and depth as a dataset."""

    def run(self) -> None:
        """Export."""
        from lyra.exporting import export
        from lyra.world import World

        for path in export(World.open(self.world), self.formats, Progress(listener=print_status)):
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            finish_line(f"{path} is {sum(file.stat().st_size for file in files) / 1e6:.1f} MB.")


@dataclass(frozen=True)
class Convert:
    """Write NVIDIA's released checkpoint as safetensors in this project's layout, which loads fast and can be 4-bit."""

    model: tyro.conf.Positional[str] = "nvidia/Lyra-2.0"
    """The Hugging Face id, or a folder with the released files."""
    out: Path = Path("lyra-2.0")
    """Folder of the converted model, to be given as --model."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the converted weights."""
    accept_licence: bool = False
    """Accept the licence of the weights, which is printed; remembered with the date."""

    def run(self) -> None:
        """Convert."""
        from lyra.convert import DTYPES, convert
        from lyra.hub import find_model

        progress = Progress(listener=print_status)
        if self.accept_licence:
            accept_licences(self.model, progress)
        convert(find_model(self.model, progress=progress), self.out, dtype=DTYPES[self.dtype], progress=progress)
        finish_line(f"{self.out} is converted; use it as --model {self.out}.")


@dataclass(frozen=True)
class Doctor:
    """Say what this machine can run, which models are there and what licence they have."""

    def run(self) -> None:
        """Print the report."""
        from lyra.doctor import report

        print(report())


Command = Generate | Reconstruct | Mesh | FlyThrough | Export | Convert | Doctor


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    quiet_libraries()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parse(arguments)
        if os.environ.get("RANK", "0") == "0" or isinstance(command, Generate):
            # Of several processes that torchrun started, only the first has work where it cannot be shared.
            command.run()
    except UserError as error:
        finish_line(f"lyra: {error}", sys.stderr)
        return USER_ERROR_CODE
    except (Cancelled, KeyboardInterrupt):
        finish_line("lyra: stopped; finished chunks are kept, run the same command to go on.", sys.stderr)
        return CANCELLED_CODE
    return 0


def parse(arguments: list[str]) -> Command:
    """The command of some arguments; --job and --resume set the defaults of the options.

    Raises:
        UserError: the job file cannot be used, or an option's value is out of range.
    """
    options, load = saved_job(arguments)
    annotated = tyro.extras.subcommand_type_from_defaults(
        {"generate": Generate(options=options, out=tyro.MISSING, load=load)}, prefix_names=False
    )
    # The union is made when the program runs, because the saved job's values are its defaults.
    generate: Any = Annotated[annotated, tyro.conf.OmitSubcommandPrefixes]
    commands: Any = generate | Reconstruct | Mesh | FlyThrough | Export | Convert | Doctor
    return tyro.cli(commands, args=arguments, prog="lyra", config=(tyro.conf.OmitArgPrefixes,))


def saved_job(arguments: list[str]) -> tuple[JobOptions, LoadOptions]:
    """The job that --job or --resume names, before the other options are applied, and how its model was placed.

    A job of a file leaves the placement to the machine; one that is resumed goes on as it was, because other number
    formats would make other frames.
    """

    def value_of(option: str) -> str | None:
        for index, argument in enumerate(arguments):
            if argument == option and index + 1 < len(arguments):
                return arguments[index + 1]
            if argument.startswith(option + "="):
                return argument.split("=", 1)[1]
        return None

    path, load = value_of("--job"), LoadOptions()
    out = value_of("--out")
    if path is None and "--resume" in arguments and out is not None:
        path = str(Path(out) / "run.json")
        if not Path(path).exists():
            raise UserError(f"{out} has no run.json to resume; give the photo instead of --resume.")
        load = LoadOptions.from_json(read_json_file(Path(path)).get("placement"))
    if path is None:
        return JobOptions(), load
    job = GenerateJob.load(Path(path))
    return JobOptions(**job.to_json()), load


def accept_licences(model: str, progress: Progress | None = None, *, find: Callable[..., object] | None = None) -> None:
    """Find a model, showing and accepting each gated licence that it asks for.

    Of several processes that torchrun started the first does so, before they meet.

    Raises:
        UserError: there is no such model, or this deployment has switched gated models off.
    """
    from lyra.hub import find_model
    from lyra.licences import LicenceNeeded, accept, notice

    find = find or find_model

    if os.environ.get("RANK", "0") != "0":
        return
    while True:
        try:
            find(model, progress=progress or Progress(listener=print_status))
            return
        except LicenceNeeded as needed:
            finish_line(notice(needed.licences), sys.stderr)
            for licence in needed.licences:
                accept(licence, "command line")


def print_status(status: Status) -> None:
    """One line on standard error, written over the last one."""
    chunk = f"chunk {status.chunk + 1}/{status.chunks}  " if status.chunks > 1 else ""
    text = f"{chunk}{status.stage}  {status.step}/{status.steps}  {status.elapsed_seconds:.0f} s"
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif status.step in (0, status.steps):
        print(text, file=sys.stderr, flush=True)


def finish_line(text: str, stream: object = None) -> None:
    """Print a final line below the progress line."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(text, file=stream or sys.stdout)  # type: ignore[arg-type]


def quiet_libraries() -> None:
    """Keep progress bars and notices of model libraries out of the output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    sys.exit(main())
