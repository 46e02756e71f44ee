"""Kernel regression on real data: bandwidths by leave-one-out, bands, cross-validation, and the attention weights behind a fit.

    python examples/regression/fit.py                             # tables, and three pictures in runs/regression
    python examples/regression/fit.py --feature bmi --out runs/bmi

The data come with scikit-learn: of diabetes patients, ten measurements, and how far the disease had gone a year later.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import jflash
from jflash.sklearn import NadarayaWatson

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = {"age": "age (years)", "sex": "sex (1 or 2)", "bmi": "body mass index (kg/m²)", "bp": "mean blood pressure (mmHg)",
          "s1": "total cholesterol (mg/dl)", "s2": "low-density lipoproteins (mg/dl)", "s3": "high-density lipoproteins (mg/dl)",
          "s4": "total cholesterol / high-density lipoproteins", "s5": "serum triglycerides (log of mg/dl)",
          "s6": "blood sugar (mg/dl)"}
RESPONSE = "disease progression after a year (score)"
ORDERS = {"constant": "Nadaraya-Watson", "linear": "local-linear"}
CRITERIA = ("loo", "gcv", "aicc")
SEVERAL = ("bmi", "bp", "s1", "s5")
PATIENTS = 440  # of 442, so that five folds are of one size and everything is compiled once for all of them
WIDE = 100  # a kernel so many times as wide as the data's range weighs all of them alike
BLUE, RED, GREEN, YELLOW = "#0072b2", "#d55e00", "#009e73", "#e69f00"  # told apart by everyone (Okabe & Ito)
FOLDS = KFold(5, shuffle=True, random_state=0)


def load(names):
  """`(X [n, features], y [n])`: the named measurements, and the disease's progression."""
  data = load_diabetes(scaled=False)
  return data.data[:PATIENTS, [data.feature_names.index(name) for name in names]], data.target[:PATIENTS]


def left_out_error(X, y, bandwidth, order, weight=None):
  """The root mean square error at each patient, of the fit to all others."""
  left_out = jflash.kernel_regression(X, y, None, bandwidth, order=order, exclude_self=True, sample_weight=weight)
  return float(np.sqrt(np.average((y - left_out) ** 2, weights=weight)))


def in_digits(width):
  return f"{width:#.3g}".rstrip(".")


def cross_validated(model, X, y):
  return cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=FOLDS, scoring="r2").mean()


# ---- tables --------------------------------------------------------------------------------------------------------


def compare_on_one(name, X, y):
  """Prints which bandwidth each criterion takes, and how well each predicts; returns the "loo" models by order."""
  models, widest = {}, WIDE * np.ptp(X, axis=0)
  print(f"\n{LABELS[name]}, {len(y)} patients\n")
  print(f"  {'fit':<17}{'criterion':<11}{'bandwidth':>9}{'left-out error':>16}{'5-fold R²':>11}")
  row = lambda fit, criterion, width, error, r2: print(f"  {fit:<17}{criterion:<11}{width:>9}{error:>16.2f}{r2:>11.3f}", flush=True)
  row("mean of all", "", "∞", left_out_error(X, y, widest, "constant"), cross_validated(DummyRegressor(), X, y))
  row("straight line", "", "∞", left_out_error(X, y, widest, "linear"), cross_validated(LinearRegression(), X, y))
  for order, title in ORDERS.items():
    for criterion in CRITERIA:
      model = NadarayaWatson(bandwidth=criterion, order=order).fit(X, y)
      width = model.bandwidth_[0]
      row(title, criterion, in_digits(width) if width < widest else "∞", left_out_error(X, y, model.bandwidth_, order),
          cross_validated(NadarayaWatson(bandwidth=criterion, order=order), X, y))
      if criterion == "loo":
        models[order] = model
  return models


def compare_on_several(names, X, y):
  """Prints one bandwidth for each feature, in its standard deviations, and what a wide one means."""
  print(f"\n{', '.join(names)}: bandwidths by loo, in standard deviations\n\n  {'fit':<17}{'':<11}"
        + "".join(f"{name:>9}" for name in names) + f"{'5-fold R²':>13}")
  print(f"  {'all straight':<28}{'':>{9 * len(names)}}{cross_validated(LinearRegression(), X, y):>13.3f}")
  Z = StandardScaler().fit_transform(X)
  for order, title in ORDERS.items():
    model = NadarayaWatson(bandwidth="loo", order=order)
    widths = model.fit(Z, y).bandwidth_
    wide = widths > np.ptp(Z, axis=0)
    print(f"  {title:<28}" + "".join(f"{'∞' if far else format(width, '.2f'):>9}" for width, far in zip(widths, wide))
          + f"{cross_validated(model, X, y):>13.3f}")
    if wide.any():
      means = "switched off" if order == "constant" else "straight (a slope, but no curve)"
      print(f"{'':>30}{means}: {', '.join(name for name, far in zip(names, wide) if far)}", flush=True)


def attention_weights(x, y, queries, bandwidth):
  """The weights `[m, n]` of a Nadaraya-Watson fit: the fit of the identity. Asserts that they are those of softmax attention."""
  weights = jflash.kernel_regression(x, np.eye(len(x)), queries, bandwidth)
  fit = jflash.kernel_regression(x, y, queries, bandwidth)
  np.testing.assert_allclose(weights @ y, fit, rtol=1e-10)
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-10)

  k, q = (jnp.asarray(points - x.mean(axis=0))[:, None] for points in (x, queries))  # [length, one head, width]
  bias = -jnp.sum(k**2, axis=2).T / (2 * bandwidth**2)  # [one head, n]
  out = jflash.attention(q, k, jnp.asarray(y)[:, None, None], bias=bias[None, :, None], scale=1 / bandwidth**2)
  np.testing.assert_allclose(out[:, 0, 0], fit, rtol=1e-10)
  print("\nweights @ y and jflash.attention(scale=1/σ², bias=-|k|²/2σ²) give the same fit: largest difference "
        f"{np.abs(out[:, 0, 0] - fit).max():.1e}")
  return np.asarray(weights)


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw_fits(models, name, path):
  """Both fits with two bands: of the mean, and of the patients around it; and the kernel, to scale."""
  figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
  for axes, (order, model) in zip(panels, models.items()):
    x, y, u = model.X_[:, 0], model.y_, np.linspace(model.X_.min(), model.X_.max(), 400)
    mean, std = model.predict(u[:, None], return_std=True)
    error = 1.96 * std / np.sqrt(model.stats(u[:, None]).effective_sample_size)
    axes.plot(x, y, "o", color="0.4", alpha=0.6, markersize=3, markeredgewidth=0, zorder=3, label="one patient")
    axes.plot(u, mean, color=BLUE, linewidth=2, zorder=4, label="fit")
    axes.fill_between(u, mean - error, mean + error, color="#8cc0e0", linewidth=0, zorder=2,
                      label="error of the mean (± 1.96 standard errors)")
    axes.fill_between(u, mean - std, mean + std, color="#faefd0", linewidth=0, zorder=1,
                      label="spread of the patients (± 1 standard deviation)")
    draw_kernel(axes, u, model.bandwidth_[0], y)
    axes.set(xlabel=LABELS[name], yticks=np.arange(0, y.max(), 50),
             title=f"{ORDERS[order]}: {'a mean' if order == 'constant' else 'a straight line'} around each point")
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel(RESPONSE)
  figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
  save(figure, path)


def draw_kernel(axes, u, bandwidth, y):
  """Under the data, on the left: a bell, with an arrow of one bandwidth."""
  floor, height = y.min() - 0.22 * np.ptp(y), 0.16 * np.ptp(y)
  if bandwidth > np.ptp(u):
    axes.text(u[0], floor, "bandwidth ∞: all patients weigh alike", color=RED, va="bottom")
    return
  centre = u[0] + min(2.6 * bandwidth, 0.4 * np.ptp(u))
  bell = np.exp(-((u - centre) ** 2) / (2 * bandwidth**2))
  axes.fill_between(u, floor, floor + height * bell, where=bell > 0.01, color=RED, alpha=0.3, linewidth=0)
  middle = floor + height * np.exp(-0.5)  # there the bell is one bandwidth wide on each side
  axes.annotate("", (centre + bandwidth, middle), (centre, middle),
                arrowprops={"arrowstyle": "<->", "color": RED, "shrinkA": 0, "shrinkB": 0})
  axes.text(centre + 1.4 * bandwidth, middle, f"kernel, bandwidth {in_digits(bandwidth)}", color=RED, va="center")


def draw_weights(model, queries, weights, name, path):
  """All weights as a map, and three of its rows over the data."""
  x, y, u = model.X_[:, 0], model.y_, queries[:, 0]
  rows = {int(np.abs(u - at).argmin()): color for at, color in zip(np.quantile(x, [0.1, 0.5, 0.97]), (RED, GREEN, YELLOW))}
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=(1, 1.1))

  image = left.pcolormesh(np.arange(len(x)), u, np.maximum(weights[:, np.argsort(x)], 1e-9), cmap="Greys", rasterized=True,
                          norm=matplotlib.colors.LogNorm(1e-4, 0.1))
  figure.colorbar(image, label="attention weight", extend="both")
  left.set(xlabel="patients (keys), sorted along the same axis", ylabel=f"query: {LABELS[name]}",
           title="each row of weights sums to 1")

  bars = right.twinx()  # under the data, in the lower half
  bars.set(ylim=(0, 2 * weights[list(rows)].max()), ylabel="attention weight of a patient (bars)")
  right.set_zorder(bars.get_zorder() + 1)
  right.patch.set_visible(False)
  right.plot(x, y, "o", color="0.4", alpha=0.6, markersize=3, markeredgewidth=0)
  right.plot(u, weights @ y, color=BLUE, linewidth=2)
  for row, color in rows.items():
    left.axhline(u[row], color=color, linewidth=2)
    bars.vlines(x, 0, weights[row], color=color, alpha=0.7, linewidth=1.5)
    right.plot(u[row], weights[row] @ y, "*", color=color, markersize=17, markeredgecolor="black")
  right.set(xlabel=LABELS[name], ylabel=RESPONSE, ylim=(0, None),
            title="three rows as bars: the mean of y under them (★) is the fit")
  save(figure, path)


def draw_errors(models, name, path):
  """The leave-one-out error against the bandwidth, and the bandwidth that was taken."""
  figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
  limits = {"constant": "the mean of all patients", "linear": "one straight line"}
  for (order, model), color, marker in zip(models.items(), (BLUE, RED), "oD"):
    x, y, best = model.X_, model.y_, model.bandwidth_[0]
    widths = np.geomspace(0.01, 10, 80) * np.ptp(x)
    axes.plot(widths, [left_out_error(x, y, width, order) for width in widths], color=color, linewidth=2, label=ORDERS[order])
    error = left_out_error(x, y, best, order)
    # The search takes equal patients for one of their weight, so that a twin vouches for nobody; then it found what is drawn.
    patients, count = np.unique(np.column_stack([x, y]), axis=0, return_counts=True)
    np.testing.assert_allclose(left_out_error(patients[:, :-1], patients[:, -1], best, order, count)**2, model.criterion_value_,
                               rtol=1e-6)
    if best < widths[-1]:
      axes.plot(best, error, marker, color=color, markersize=9, markeredgecolor="black",
                label=f"its minimum: bandwidth {in_digits(best)}")
    axes.text(widths[-1], left_out_error(x, y, widths[-1], order), limits[order], color=color, ha="right", va="bottom")
  spread = left_out_error(x, y, widths[-1], "constant")
  axes.set(xscale="log", ylim=(None, 1.2 * spread), xlabel=f"bandwidth, in units of the {LABELS[name]}",
           ylabel="leave-one-out error of the fit (root mean square)",
           title="too narrow a kernel follows the noise, too wide a one flattens the curve")
  axes.xaxis.set_major_formatter("{x:g}")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, loc="upper right")
  save(figure, path)


def save(figure, path):
  figure.savefig(path, dpi=100)
  plt.close(figure)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--feature", choices=[name for name in LABELS if name != "sex"], default="s5",
                      help="the measurement on the pictures' axis")
  parser.add_argument("--out", default="runs/regression", type=pathlib.Path, help="folder of the pictures")
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)

  X, y = load([args.feature])
  models = compare_on_one(args.feature, X, y)
  compare_on_several(SEVERAL, *load(SEVERAL))

  queries = np.linspace(X.min(), X.max(), 300)[:, None]
  weights = attention_weights(X, y, queries, models["constant"].bandwidth_[0])
  draw_fits(models, args.feature, args.out / "fit.png")
  draw_weights(models["constant"], queries, weights, args.feature, args.out / "weights.png")
  draw_errors(models, args.feature, args.out / "bandwidth.png")
  print(f"\nfiles in {args.out}/   fit.png weights.png bandwidth.png")


if __name__ == "__main__":
  with jax.enable_x64(True):
    main()
