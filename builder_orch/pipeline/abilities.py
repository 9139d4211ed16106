"""What a builder can do, and the refusal, before anything is sent, of what it would not do."""

from builder_orch.buildkit.control import version_of
from builder_orch.errors import UsageFailure
from builder_orch.pipeline.engine import Recipe
from builder_orch.pipeline.output import Form

LIMITS_SINCE = (1, 42)
"""The API of Docker 23.0; the BuildKit before takes no notice of limits for RUN."""


def check_abilities(recipe: Recipe, containerd_store: bool, api_version: str) -> None:
    """UsageFailure for the first thing that this BuildKit refuses, or takes no notice of.

    An engine with containerd's image store can export whatever BuildKit can; one with Docker's own
    keeps one platform at a time, and no caches besides its images.
    """
    if recipe.ulimits and version_of(api_version) < LIMITS_SINCE:
        raise UsageFailure(
            f"--ulimit needs Docker 23.0 or later on the builder: its engine (API {api_version}) "
            "would build as if it were not there",
            hint="Do without it, or set the limit inside the step: RUN ulimit -n 1024 && ...",
        )
    if containerd_store:
        return
    form = recipe.output.form
    if len(recipe.platforms) > 1 and form not in {Form.LOCAL, Form.TAR}:
        raise UsageFailure(
            f"one image for {' and '.join(recipe.platforms)} needs an engine with containerd's "
            "image store; the builder's has Docker's own",
            hint="Build one platform at a time, or take the files: --dest type=local,dest=DIR.",
        )
    for cache in recipe.cache_to:
        if cache.kind != "inline":
            raise UsageFailure(
                f"--cache-to type={cache.kind} needs an engine with containerd's image store; "
                "the builder's has Docker's own",
                hint="Take --cache-to type=inline: the cache travels in the image, and is read "
                "again with --cache-from IMAGE.",
            )
    if form is Form.OCI:
        raise UsageFailure(
            "--dest type=oci needs an engine with containerd's image store; "
            "the builder's has Docker's own",
            hint="Take --dest type=docker,dest=FILE, the archive that `docker load` reads.",
        )


def beyond_classic(recipe: Recipe) -> list[tuple[str, bool]]:
    """The flags that the classic builder knows nothing of, and whether they were given."""
    output = recipe.output
    return [
        ("--secret", bool(recipe.secrets)),
        ("--ssh", bool(recipe.agents)),
        ("--cache-to", bool(recipe.cache_to)),
        ("--ulimit", bool(recipe.ulimits)),
        ("--build-context", bool(recipe.contexts)),
        ("more than one --platform", len(recipe.platforms) > 1),
        (f"--dest type={output.form.value}", output.exported),
    ]
