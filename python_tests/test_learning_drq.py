"""DrQ learns to catch a falling ball from pixels: random play earns -0.71, perfect play 1."""

from toy_training import mean_return, train
from toys import Catch

from urlfast.augment import AugmentConfig
from urlfast.learners.drq import DrQConfig
from urlfast.methods.task import Task, TaskConfig
from urlfast.nets.encoders import EncoderConfig

CONFIG = TaskConfig(
    encoder=EncoderConfig(conv=((16, 8, 4), (32, 4, 2), (32, 3, 1))),
    learner=DrQConfig(hidden=128, lr=5e-4, tau=0.01),
    online_views=2,
    target_views=2,
    n_step=3,
    updates_per_step=0.5,
    learning_start=200,
    epsilon_decay=2000,
    augment=AugmentConfig(shift=4, intensity=0.05),
)


def learned(seed, **broken):
    method = Task(CONFIG, (1, 84, 84), 3, seed=seed, frame_stack=1)
    train(method, Catch(num_envs=4, seed=seed, frame_stack=1), 4000, **broken)
    return mean_return(method, Catch(num_envs=20, seed=1000 + seed, frame_stack=1), 100)


def test_drq_learns_to_catch():
    """One retry with another seed. Seeds 0 and 1 reach 1.00; with the action of the step before stored beside each frame, -0.06."""
    assert learned(0) >= 0.8 or learned(1) >= 0.8
