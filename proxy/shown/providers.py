"""Providers, and the models that they serve."""

import msgspec

from proxy.catalog import Catalog


class ProviderItem(msgspec.Struct):
    """A provider, and the models that it serves just now."""

    name: str
    enabled: bool
    models: list[str]


class ProviderList(msgspec.Struct):
    """All providers of the configuration."""

    items: list[ProviderItem]
    next_cursor: None = None


class ProviderSwitched(msgspec.Struct):
    """A provider as it is from now on."""

    name: str
    enabled: bool


def provider_list(catalog: Catalog) -> ProviderList:
    """Every provider, with the models that it serves, as it knows them."""
    models: dict[str, set[str]] = {name: set() for name in catalog.providers}
    for found in catalog.models.values():
        for candidate in found:
            models[candidate.provider].add(candidate.model)
    return ProviderList(
        [ProviderItem(name, state.is_enabled, sorted(models[name])) for name, state in catalog.providers.items()]
    )
