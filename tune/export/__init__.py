"""What leaves a run: adapter folder, merged model with its proof, model card, publication."""
