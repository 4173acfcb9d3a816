"""The demonstration: a coordinator and several sites on one machine, with real models and real, different data."""
