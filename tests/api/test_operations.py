"""Our documents against both schemas, and our schema against the public one."""

from pathlib import Path

import pytest
from graphql import (
    GraphQLInputObjectType,
    GraphQLObjectType,
    GraphQLSchema,
    build_schema,
    is_required_input_field,
    validate,
)

from builder_orch.api.client import (
    IDEMPOTENT,
    IDEMPOTENT_SELFHOST,
    is_mutation,
    operations,
)
from builder_orch.selfhost.api import check_size, load_schema

PUBLIC = Path(__file__).parents[3] / "shared/reference/fly-schema.graphql"


@pytest.fixture(scope="module")
def public() -> GraphQLSchema:
    if not PUBLIC.exists():
        pytest.skip(f"the public schema is not here: {PUBLIC}")
    return build_schema(PUBLIC.read_text("utf-8"))


@pytest.mark.parametrize("name", operations())
def test_every_operation_is_valid_on_the_public_platform(public: GraphQLSchema, name: str) -> None:
    assert validate(public, operations()[name]) == []


@pytest.mark.parametrize("name", operations())
def test_every_operation_is_valid_and_within_limits_on_selfhost(name: str) -> None:
    assert validate(load_schema(), operations()[name]) == []
    check_size(operations()[name])


def test_selfhost_has_the_public_names_and_types(public: GraphQLSchema) -> None:
    for name, own in load_schema().type_map.items():
        if not isinstance(own, GraphQLObjectType | GraphQLInputObjectType) or name[:2] == "__":
            continue
        theirs = public.type_map[name]
        assert isinstance(theirs, type(own))
        assert isinstance(theirs, GraphQLObjectType | GraphQLInputObjectType)
        for field, definition in own.fields.items():
            assert str(definition.type) == str(theirs.fields[field].type), f"{name}.{field}"
            for argument, value in getattr(definition, "args", {}).items():
                their_args = getattr(theirs.fields[field], "args", {})
                assert str(value.type) == str(their_args[argument].type), f"{name}.{field}"
        if isinstance(theirs, GraphQLInputObjectType):
            needed = {n for n, field in theirs.fields.items() if is_required_input_field(field)}
            assert needed <= set(own.fields), name


def test_the_idempotent_operations_are_mutations_that_exist() -> None:
    assert IDEMPOTENT < IDEMPOTENT_SELFHOST
    assert all(is_mutation(operations()[name]) for name in IDEMPOTENT_SELFHOST)
    assert "CreateRelease" not in IDEMPOTENT


def test_each_document_carries_one_operation_alone() -> None:
    for name, document in operations().items():
        named = [getattr(part, "name").value for part in document.definitions]  # noqa: B009
        assert [one for one in named if one in operations()] == [name]
