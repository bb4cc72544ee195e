"""Schedules, each a function of the numbers of devices and microbatches; compute actions only (F, I, W, B)."""
