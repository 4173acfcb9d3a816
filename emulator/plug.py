"""An adapter in the base, to be measured: the plug-in."""

from torch import nn

from offsite.emulator.methods import Adapter, Method


def plug(base: nn.Module, method: Method, adapter: Adapter) -> nn.Module:
    """Put a recovered adapter into the base, in place; raises ValueError if it does not fit.

    One that its method attaches stays beside the weights, which keeps what rounding to the base's dtype would lose.
    """
    if method.attaches:
        itself = {layer: layer for layer in sorted({int(key.partition(".")[0]) for key in adapter})}
        return method.attach(base, itself, adapter)
    method.merge(base, adapter)
    return base
