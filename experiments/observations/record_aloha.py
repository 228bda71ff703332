"""Record a few observations of the simulated ALOHA robot, as input of the workload `aloha`.

    pip install gym-aloha
    python experiments/observations/record_aloha.py aloha_sim.npz

gym-aloha is no dependency of pi0exp: only this script needs it. Rendering needs EGL (Debian: libegl1 libgl1-mesa-dri);
a GPU is not needed. Takes about a minute on two CPU cores. README.md beside this file says what is recorded.
"""

import os
import sys
from pathlib import Path

import numpy as np

from pi0exp.preprocess import resize_with_pad

TASK = "gym_aloha/AlohaTransferCube-v0"
PROMPT = "Transfer cube"
SEED = 0
OBSERVATIONS = 8
STRIDE = 35  # steps from one kept observation to the next: neighbours would look alike
IMAGE_SIZE = 224


def record(path: Path) -> None:
    # The simulator looks for a way to render when it is imported, and there is no other way to name one.
    os.environ.setdefault("MUJOCO_GL", "egl")
    import gym_aloha  # type: ignore[import-not-found, unused-ignore] # noqa: F401 (registers the environments)
    import gymnasium  # type: ignore[import-not-found, unused-ignore]

    env = gymnasium.make(TASK, obs_type="pixels_agent_pos")
    observation, _ = env.reset(seed=SEED)
    random = np.random.default_rng(SEED)
    target_A = observation["agent_pos"].astype(np.float32)  # actions are joint targets, like the state
    home_A = target_A.copy()
    images, states, steps = [], [], []
    for step in range(OBSERVATIONS * STRIDE):
        if step % STRIDE == 0:
            images.append(resize_with_pad(observation["pixels"]["top"], IMAGE_SIZE))
            states.append(observation["agent_pos"])
            steps.append(step)
        # A random walk drawn back to the start pose: the arms move, but do not flail.
        target_A = target_A + 0.05 * random.standard_normal(len(home_A)) - 0.03 * (target_A - home_A)
        target_A = np.clip(target_A, env.action_space.low, env.action_space.high).astype(np.float32)
        observation, _, terminated, truncated, _ = env.step(target_A)
        if terminated or truncated:
            break
    np.savez_compressed(
        path,
        image_N224x224x3=np.stack(images),
        state_N14=np.asarray(states, np.float32),
        camera_mask_3=np.array([True, False, False]),
        step_N=np.asarray(steps, np.int32),
        prompt=np.array(PROMPT),
    )
    print(f"{path}: {len(images)} observations, {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python record_aloha.py FILE.npz")
    record(Path(sys.argv[1]))
