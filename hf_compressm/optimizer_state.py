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
# By which power of a number an entry is multiplied when its parameter is multiplied with that number, and its gradient
# so divided by it. Entries that are not here stay as they are.
POWERS = {
    "exp_avg": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "exp_inf": -1,
    "momentum_buffer": -1,
    "square_avg": -2,
    "grad_avg": -1,
    "acc_delta": 2,
    "sum": -2,
    "row_var": -2,
    "col_var": -2,
    "variance": -2,
    "exp_avg_sq_row": -2,
    "exp_avg_sq_col": -2,
}
# Entries that hold one number for the whole parameter.
WHOLE_STATE = {"step", "mu_product", "RMS"}
