"""A tiny model with a random VAE, and a folder of pictures with two broken ones."""

from tiny_models import folder, model, noise, vae, vae_folder
