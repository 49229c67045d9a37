"""Learners turn features and rewards into a policy. Each is one file, given its networks and its reward; none imports a method.

The contract, which every learner keeps and no base class enforces:

    act(features, state, explore) -> action, state
        features (N, F) of the current observations; state is the recurrent state, None where the learner has none. explore: how much of
        the learner's own way to explore, a probability of a random action or a standard deviation of noise; 0: the best action it knows.
    uniform(n) -> action
    exploration(steps) -> explore
        Of acting, `steps` agent steps after learning began.
    prepare(steps) -> whole
        Before each update, outside of what a CUDA graph holds, with the same count. False: the update leaves the actor and the EMA copies
        as they are, and its owner leaves the encoder's so. The two kinds run different kernels: each is a graph of its own.
    update(batch, reward, online, target) -> metrics, priorities
        One gradient step on `reward` (B,). `online` holds M views of o_t, detached leaves whose .grad the learner fills; `target` holds K
        pairs of views of o_{t+m}: (online-encoded, EMA-encoded). Metrics and priorities are tensors: nothing here waits for the device.
    state_dict() / load_state_dict(state)

R2D2, which learns from sequences and remembers, differs in what memory asks for; its file says how.
"""
