"""The generate wing: pictures from densities, diffusion and autoregression, adaptively spent."""
