"""Devices: the mesh, what runs inside the mapped step, processes, signals, compiler workarounds."""
