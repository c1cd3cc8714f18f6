"""Federated multimodal learning: the library. It knows neither `clients/` nor `server/` nor any experiment."""
