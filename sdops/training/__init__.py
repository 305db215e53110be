"""The trainer: one loop, and everything that it needs of pictures, texts, noise and models.

    config            every setting: name, default, range and help, for files, options and Python alike
    pictures          what a folder holds: sizes, captions, masks, and what is wrong with it
    batches           step -> the samples of that step, from the seed alone
    latents           pictures as means and deviations of the VAE, made once; latent_store keeps them on the disk
    tokens            texts to tokens, new words and long texts among them
    feeder            what a step computes with: latents, noise, noise steps, weights, texts
    diffusion         noise, targets and weights of the loss, as the papers write them
    model             UNet, VAE and text encoders in one hand
    words             vectors of new words beside a frozen vocabulary; beginnings says what they begin as
    changes           layers with LoRA, LoHa, LoKr, DoRA on top, as forms says; kernels computes them on a GPU
    cross_attention   keys and values of all cross-attentions at once
    parameters        everything that learns in one flat buffer
    optimizer         AdamW over it, clipping, the stop at what is not finite, the moving average
    rates, blocks     learning rates over time, and by block
    method, product   what training methods have in common, and what they give
    graphs            steps recorded and replayed on CUDA
    workers           several processes
    loop              the loop
    interruption      Ctrl-C, held back until a step is done
    sampling          pictures on the way
    state, log        where a run stands, and what happened

`trainers/` says what is learnt, what the loss is and what is saved. Files of models are opened and written by
`verbs/_train_*.py`; nothing here knows how a checkpoint is spelled. torch, diffusers and transformers are imported by
the parts that compute: `config`, `forms`, `pictures` and `batches` are enough to check a run.
"""
