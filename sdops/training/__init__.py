"""The trainer: one loop, and everything that it needs of pictures, texts, noise and models.

    config      every setting: name, default, range and help, for files, options and Python alike
    pictures    what a folder holds: sizes, captions, masks, and what is wrong with it
    batches     step -> the samples of that step, from the seed alone
    latents     pictures as means and deviations of the VAE, made once
    texts       prompts as tokens and, where the encoders stay as they are, as their outputs, made once
    diffusion   noise, targets and weights of the loss, as the papers write them
    model       UNet, VAE and text encoders in one hand
    parameters  everything that learns in one flat buffer
    changes     layers with LoRA, LoHa, LoKr, DoRA on top
    words       vectors of new words beside a frozen vocabulary
    loop        the loop

`trainers/` says what is learnt, what the loss is and what is saved. Files of models are opened and written by
`verbs/_train_*.py`; nothing here knows how a checkpoint is spelled. torch, diffusers and transformers are imported by
the parts that compute: `config`, `pictures` and `batches` are enough to check a run.
"""
