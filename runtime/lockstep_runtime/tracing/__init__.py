"""Requests and recoveries as OpenTelemetry traces. Off unless the standard variables name a collector; nothing that
serves waits for one, and no span has prompts or answers."""
