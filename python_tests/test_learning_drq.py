"""DrQ learns to catch a falling ball from pixels: random play earns -0.71, perfect play 1."""

from toy_training import mean_return, train
from toys import Catch

from urlfast.augment import AugmentConfig
from urlfast.learners.drq import DrQConfig
from urlfast.methods.task import Task, TaskConfig
from urlfast.nets.encoders import EncoderConfig

CONFIG = TaskConfig(
    encoder=EncoderConfig(conv=((16, 4, 2), (32, 4, 2), (32, 3, 2))),
    learner=DrQConfig(hidden=128, lr=5e-4, tau=0.01, epsilon_decay=2000),
    online_views=2,
    target_views=2,
    n_step=3,
    updates_per_step=0.5,
    learning_start=200,
    augment=AugmentConfig(shift=2, intensity=0.05),
)


def learned(seed, **broken):
    method = Task(CONFIG, (1, 44, 44), 3, seed=seed, frame_stack=1)
    train(method, Catch(num_envs=4, seed=seed, frame_stack=1), 3000, **broken)
    return mean_return(method, Catch(num_envs=20, seed=1000 + seed, frame_stack=1), 100)


def test_drq_learns_to_catch():
    """One retry with another seed; seeds 0 and 1 reach 1.00."""
    assert learned(0) >= 0.8 or learned(1) >= 0.8


def test_and_does_not_with_the_action_of_the_step_before_beside_each_frame():
    """What the test above is there to catch; seed 0 reaches -0.74."""
    assert learned(0, stored_action=lambda action, previous: previous) < 0.2
