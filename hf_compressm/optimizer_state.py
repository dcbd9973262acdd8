"""What optimizers keep of a parameter, by the names that they give it."""

# State entries with one number per parameter entry (or, in Adafactor's factors, per row and per column).
# Key → the optimizers that use it. An optimizer whose keys are not here is refused: add its keys if its state is
# elementwise, or a factor that keeps the parameter's dimensions in order.
SLICED_STATE = {
    "exp_avg": "Adam, AdamW, Adamax, NAdam, RAdam, Lion, Adafactor",
    "exp_avg_sq": "Adam, AdamW, NAdam, RAdam, Adafactor without factors",
    "max_exp_avg_sq": "Adam and AdamW with amsgrad",
    "exp_inf": "Adamax",
    "momentum_buffer": "SGD, RMSprop, Muon",
    "square_avg": "RMSprop, Adadelta",
    "grad_avg": "RMSprop",
    "acc_delta": "Adadelta",
    "sum": "Adagrad",
    "row_var": "torch.optim.Adafactor",
    "col_var": "torch.optim.Adafactor",
    "variance": "torch.optim.Adafactor",
    "exp_avg_sq_row": "transformers.Adafactor",
    "exp_avg_sq_col": "transformers.Adafactor",
}
# Entries that hold one number for the whole parameter.
WHOLE_STATE = {"step", "mu_product", "RMS"}
