"""scikit-learn: support vectors, clustering, kernels, text, neighbours, polynomials, a choice of classifiers."""

from __future__ import annotations

import numpy as np
import optuna
from sklearn.cluster import DBSCAN, AgglomerativeClustering, KMeans, MiniBatchKMeans
from sklearn.datasets import make_blobs, make_classification, make_friedman1
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern, WhiteKernel
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.metrics import silhouette_score
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import SVC


def svc(trial: optuna.Trial) -> float:
    """Support vectors, with the kernel cache and the share of the data among the parameters."""
    x, y = make_classification(12_000, 20, n_informative=8, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.25, random_state=0)
    rows = int(len(x) * trial.suggest_float("subsample", 0.05, 1.0))
    kernel = trial.suggest_categorical("kernel", ["linear", "rbf", "poly"])
    keywords: dict[str, float] = {}
    if kernel == "poly":
        keywords["degree"] = trial.suggest_int("degree", 2, 4)
    if kernel != "linear":
        keywords["gamma"] = trial.suggest_float("gamma", 1e-3, 1.0, log=True)
    classifier = SVC(
        C=trial.suggest_float("C", 1e-2, 10.0, log=True),
        kernel=kernel,
        cache_size=trial.suggest_int("cache_mb", 20, 400),
        probability=trial.suggest_categorical("probability", [False, True]) and rows < 3000,
        max_iter=4_000,
        **keywords,
    )
    classifier.fit(StandardScaler().fit_transform(x[:rows]), y[:rows])
    return float(classifier.score(x_valid[:1000], y_valid[:1000]))


def clustering(trial: optuna.Trial) -> float:
    """One of four algorithms, one of them quadratic in the rows."""
    rows = trial.suggest_int("rows", 500, 20_000, log=True)
    x, _ = make_blobs(rows, 16, centers=12, cluster_std=4.0, random_state=0)
    if trial.suggest_categorical("reduce", [True, False]):
        x = PCA(trial.suggest_int("components", 2, 12), random_state=0).fit_transform(x)
    algorithm = trial.suggest_categorical("algorithm", ["kmeans", "minibatch", "agglomerative", "dbscan"])
    if algorithm == "kmeans":
        model = KMeans(
            trial.suggest_int("kmeans_clusters", 2, 200, log=True),
            n_init=trial.suggest_int("n_init", 1, 4),
            max_iter=40,
            random_state=0,
        )
    elif algorithm == "minibatch":
        model = MiniBatchKMeans(
            trial.suggest_int("minibatch_clusters", 2, 200, log=True),
            batch_size=trial.suggest_int("batch_size", 64, 16_384, log=True),
            random_state=0,
        )
    elif algorithm == "agglomerative":
        linkage = trial.suggest_categorical("linkage", ["ward", "average", "complete"])
        x = x[:9_000]
        model = AgglomerativeClustering(trial.suggest_int("tree_clusters", 2, 50), linkage=linkage)
    else:
        model = DBSCAN(eps=trial.suggest_float("eps", 0.5, 20.0), min_samples=trial.suggest_int("min_samples", 2, 20))
    labels = model.fit_predict(x)
    if len(set(labels)) < 2:
        return -1.0
    return float(silhouette_score(x, labels, sample_size=min(1_000, len(x)), random_state=0))


def kernel_ridge(trial: optuna.Trial) -> float:
    """An exact kernel, quadratic in the rows, or one of two approximations of it."""
    rows = trial.suggest_int("rows", 300, 6_000)
    x, y = make_friedman1(rows + 1_000, 12, noise=1.0, random_state=0)
    method = trial.suggest_categorical("method", ["exact", "nystroem", "fourier"])
    gamma = trial.suggest_float("gamma", 1e-3, 10.0, log=True)
    alpha = trial.suggest_float("alpha", 1e-6, 10.0, log=True)
    if method == "exact":
        kernel = trial.suggest_categorical("kernel", ["rbf", "laplacian", "polynomial"])
        model = KernelRidge(alpha=alpha, kernel=kernel, gamma=gamma)
        if kernel == "laplacian":  # one pass over all pairs of rows and columns is slow
            x, y = x[-3_000:], y[-3_000:]
    elif method == "nystroem":
        components = trial.suggest_int("landmarks", 10, 1_500, log=True)
        model = make_pipeline(Nystroem(gamma=gamma, n_components=min(components, rows)), Ridge(alpha))
    else:
        components = trial.suggest_int("frequencies", 10, 4_000, log=True)
        model = make_pipeline(RBFSampler(gamma=gamma, n_components=components, random_state=0), Ridge(alpha))
    model.fit(x[:-1_000], y[:-1_000])
    return float(np.mean((model.predict(x[-1_000:]) - y[-1_000:]) ** 2))


def text(trial: optuna.Trial) -> float:
    """Word or character n-grams of generated sentences, then one of three models."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnopqrst"), rng.integers(3, 9))) for _ in range(6_000)])
    weights = 1 / np.arange(1, len(words) + 1) ** 1.05
    documents = [" ".join(rng.choice(words, 40, p=weights / weights.sum())) for _ in range(2_500)]
    labels = np.array([ord(document[0]) % 2 for document in documents])
    analyzer = trial.suggest_categorical("analyzer", ["word", "char", "char_wb"])
    longest = trial.suggest_int("max_ngram", 1, 3) if analyzer == "word" else trial.suggest_int("max_chars", 2, 5)
    limited = trial.suggest_categorical("limited", [True, False])
    vectorizer = TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=(1, longest),
        min_df=trial.suggest_int("min_df", 1, 10),
        max_features=trial.suggest_int("max_features", 500, 100_000, log=True) if limited else None,
        sublinear_tf=trial.suggest_categorical("sublinear", [True, False]),
    )
    model = trial.suggest_categorical("model", ["logistic", "bayes", "svd"])
    x = vectorizer.fit_transform(documents)
    if model == "bayes":
        classifier = MultinomialNB(alpha=trial.suggest_float("smoothing", 1e-3, 10, log=True))
    elif model == "svd":
        x = TruncatedSVD(min(trial.suggest_int("topics", 2, 64), x.shape[1] - 1), n_iter=2).fit_transform(x)
        classifier = LogisticRegression(max_iter=50)
    else:
        classifier = SGDClassifier(
            loss="log_loss", alpha=trial.suggest_float("alpha", 1e-6, 1e-1, log=True), random_state=0
        )
    return float(classifier.fit(x[:2_000], labels[:2_000]).score(x[2_000:], labels[2_000:]))


def neighbours(trial: optuna.Trial) -> float:
    """Nearest neighbours or an exact Gaussian process."""
    rows = trial.suggest_int("rows", 400, 60_000, log=True)
    x, y = make_friedman1(rows + 500, trial.suggest_int("columns", 5, 40), noise=0.5, random_state=0)
    if trial.suggest_categorical("model", ["knn", "process"]) == "knn":
        model = KNeighborsRegressor(
            n_neighbors=trial.suggest_int("n_neighbors", 1, 100, log=True),
            weights=trial.suggest_categorical("weights", ["uniform", "distance"]),
            algorithm=trial.suggest_categorical("algorithm", ["kd_tree", "brute", "ball_tree"]),
            leaf_size=trial.suggest_int("leaf_size", 5, 200, log=True),
        )
    else:
        kernel = {"rbf": RBF(3.0), "matern": Matern(3.0, nu=1.5)}[
            trial.suggest_categorical("kernel", ["rbf", "matern"])
        ]
        model = GaussianProcessRegressor(kernel + WhiteKernel(0.1), optimizer=None)
        x, y = x[-3_500:], y[-3_500:]
    model.fit(x[:-500], y[:-500])
    return float(np.mean((model.predict(x[-500:]) - y[-500:]) ** 2))


def polynomial(trial: optuna.Trial) -> float:
    """Polynomial features, whose number explodes with the degree, then ridge or a reduction before it."""
    columns = trial.suggest_int("columns", 4, 30)
    x, y = make_friedman1(6_000, max(columns, 5), noise=1.0, random_state=0)
    degree = trial.suggest_int("degree", 1, 3)
    interactions = trial.suggest_categorical("interaction_only", [True, False])
    steps = [PolynomialFeatures(degree, interaction_only=interactions, include_bias=False)]
    if trial.suggest_categorical("scale", [True, False]):
        steps.append(StandardScaler())
    x = x[: trial.suggest_int("rows", 1_000, 6_000, step=500), :columns]
    y = y[: len(x)]
    if degree < 3 and trial.suggest_categorical("reduce", [True, False]):
        steps.append(PCA(trial.suggest_float("variance", 0.5, 0.99), svd_solver="full"))
    solver = trial.suggest_categorical("solver", ["cholesky", "lsqr"])
    model = make_pipeline(*steps, Ridge(trial.suggest_float("alpha", 1e-4, 100, log=True), solver=solver))
    half = len(x) // 2
    model.fit(x[:half], y[:half])
    return float(np.mean((model.predict(x[half:]) - y[half:]) ** 2))


def simple(trial: optuna.Trial) -> float:
    """Optuna's sklearn_simple, with more classifiers and cross-validation."""
    x, y = make_classification(5_000, 40, n_informative=15, n_classes=4, random_state=0)
    name = trial.suggest_categorical("classifier", ["SVC", "RandomForest", "ExtraTrees", "MLP", "LogReg"])
    if name == "SVC":
        classifier = SVC(C=trial.suggest_float("svc_c", 1e-3, 1e3, log=True), gamma="auto", max_iter=2_000)
    elif name == "RandomForest":
        classifier = RandomForestClassifier(
            max_depth=trial.suggest_int("rf_max_depth", 2, 32, log=True),
            n_estimators=trial.suggest_int("rf_trees", 10, 150, log=True),
            random_state=0,
        )
    elif name == "ExtraTrees":
        classifier = ExtraTreesClassifier(
            max_depth=trial.suggest_int("et_max_depth", 2, 32, log=True),
            n_estimators=trial.suggest_int("et_trees", 10, 300, log=True),
            max_features=trial.suggest_float("et_max_features", 0.1, 1.0),
            random_state=0,
        )
    elif name == "MLP":
        width = trial.suggest_int("mlp_width", 8, 1024, log=True)
        depth = trial.suggest_int("mlp_depth", 1, 3)
        classifier = MLPClassifier(
            [width] * depth,
            batch_size=trial.suggest_categorical("mlp_batch", [32, 256, 2048]),
            max_iter=3,
            random_state=0,
        )
    else:
        classifier = LogisticRegression(C=trial.suggest_float("lr_c", 1e-3, 1e2, log=True), max_iter=100)
    return float(cross_val_score(classifier, x, y, cv=2).mean())
