"""What every diffusion-policy algorithm here shares: policies, critics and losses."""
