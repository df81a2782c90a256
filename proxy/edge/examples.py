"""Examples for the OpenAPI document, made of the schemas of the bodies and of what their fields are called."""

from typing import Any, Final

Json = dict[str, Any]

REQUEST_ID = "req_0199d2c3a4b5c6d7e8f90123456789ab"

_DEPTH_MAX = 8
"""Schemas may lead back to themselves."""

_INSTANT = "2026-11-24T09:30:00.000000Z"

BY_NAME: Final[Json] = {
    "access_token": "eyJhbGciOiJIUzI1NiIs….….…",
    "amount": "2.5",
    "available": "9.5",
    "balance": "10",
    "balance_after": "9.999",
    "balance_before": "10",
    "allowed_models": ["gpt-4o*"],
    "charged": "0.001",
    "code": "invalid_value",
    "context_length": 128000,
    "context_tokens": 128000,
    "cost": "0.001",
    "credits_balance": "9.999",
    "credits_charged": "0.001",
    "currency": "credits",
    "description": "For the team",
    "email": "ann@example.com",
    "expires_in": 2592000,
    "full_name": "Ann Example",
    "id": "01a2b3c4",
    "input": "2.5",
    "input_tokens": 1200,
    "kind": "user",
    "key": "sk-tg-8mQv…",
    "limit_amount": "5",
    "limit_period": "month",
    "markup_percent": "15",
    "max_output_tokens": 16384,
    "message": "What went wrong, in a sentence.",
    "model": "gpt-4o-mini",
    "models": ["gpt-4o-mini"],
    "name": "laptop",
    "output": "10",
    "output_tokens": 300,
    "owed": "0",
    "password": "four words of yours",
    "current_password": "four words of yours",
    "new_password": "four other words then",
    "percent": "15",
    "prefix": "sk-tg-8mQv",
    "price": {"input": "2.5", "output": "10", "max_output_tokens": 16384, "context_tokens": 128000},
    "provider": "openai",
    "providers": ["openai"],
    "provider_cost": "0.00087",
    "refunded": "0",
    "request_id": REQUEST_ID,
    "reserved": "0.5",
    "scope": "inference",
    "shortfall": "0",
    "spent": "0.75",
    "state": "settled",
    "status": "ok",
    "subject": "ann@example.com",
    "target": "openai/gpt-4o-mini",
    "token_type": "bearer",
    "usage": {"input": 1200, "output": 300},
    "usage_source": "reported",
}
"""What stands in fields of these names, where their schemas allow it."""

_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}


def example(schema: Json, schemas: Json, name: str = "", depth: int = 0) -> Any:
    """A value that fits `schema`, whose references are to `schemas`; `name` is that of the field that it is for."""
    schema = _resolved(schema, schemas)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if depth == 0 and schema.get("examples"):
        return schema["examples"][0]  # of a whole body
    variants = [_resolved(each, schemas) for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]
    if variants:
        return _example_of_one(variants, schemas, name, depth)
    if _fits(BY_NAME.get(name), schema):
        return BY_NAME[name]
    if schema.get("default") is not None:
        return schema["default"]
    return _made_up(schema, schemas, name, depth)


def _example_of_one(variants: list[Json], schemas: Json, name: str, depth: int) -> Any:
    telling = [each for each in variants if each.get("type") != "null"]
    if not telling or depth >= _DEPTH_MAX:
        return None
    chosen = next((each for each in telling if _fits(BY_NAME.get(name), each)), telling[0])
    return example(chosen, schemas, name, depth)


def _resolved(schema: Json, schemas: Json) -> Json:
    while "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    return schema


def _fits(value: Any, schema: Json) -> bool:
    """Whether `value` is of the type that `schema` names, as far as values from above need to be told apart."""
    if "enum" in schema:
        return value in schema["enum"]
    if not isinstance(value, _KINDS.get(schema.get("type", ""), ())):
        return False
    # What is in a list or an object of a schema of its own is its own schema's to say.
    if isinstance(value, dict):
        return "properties" not in schema and schema.get("additionalProperties") is not False
    return not (isinstance(value, list) and schema.get("items", {}).get("type") != "string") and "format" not in schema


def _made_up(schema: Json, schemas: Json, name: str, depth: int) -> Any:
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {each: example(found, schemas, each, depth + 1) for each, found in properties.items()}
        case "array":
            return [] if depth >= _DEPTH_MAX else [example(schema.get("items", {}), schemas, name, depth + 1)]
        case "string":
            return _INSTANT if schema.get("format") == "date-time" or name.endswith("_at") else "…"
        case "integer" | "number":
            return int(max(schema.get("minimum", 1), min(schema.get("maximum", 1), 1)))
        case "boolean":
            return True
        case _:
            return None
