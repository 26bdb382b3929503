"""How a bundle runs: with torch, or one step of it on a CPU with OpenVINO and no torch at all."""
