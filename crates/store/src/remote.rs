//! A store on S3-compatible object storage.
//!
//! Requests run on a small runtime in a thread of its own, so the calls block, from any thread. Retries are made here, not
//! in the client: only here is it known that a conditional write whose answer was lost may have gone through.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::path::Path;
use object_store::{
    ClientOptions, Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    RetryConfig, UpdateVersion,
};

use crate::error::{OpenError, StorageError, folder_name};
use crate::storage::{Entry, Folder, Key, Object, Storage, Swapped, Version};

/// How object storage is reached.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RemoteOptions {
    /// Where the server is, such as `http://localhost:8333`; `None` for the region's own.
    pub endpoint: Option<String>,
    /// The longest that one request may take.
    pub timeout: Duration,
    /// How often a request is tried.
    pub tries: u32,
    /// The pause after the first failed try; it doubles with each, up to 5 s, and is shortened at random.
    pub backoff: Duration,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            timeout: Duration::from_secs(60),
            tries: 10,
            backoff: Duration::from_millis(100),
        }
    }
}

/// The longest pause between two tries.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// A store below a prefix of a bucket.
pub struct RemoteStorage {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    place: String,
    options: RemoteOptions,
    runtime: tokio::runtime::Handle,
    /// Ends the runtime's thread when it is dropped.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    retries: AtomicU64,
}

impl RemoteStorage {
    /// `s3://BUCKET/PREFIX`. Credentials and region come from the environment, as with other tools: `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT`. No request is made yet.
    ///
    /// # Errors
    /// If the URL or the environment is not right.
    pub fn s3(url: &str, options: RemoteOptions) -> Result<Self, OpenError> {
        Self::s3_from(url, options, AmazonS3Builder::from_env())
    }

    /// [`s3`](Self::s3) with credentials of the caller's.
    ///
    /// # Errors
    /// As [`s3`](Self::s3).
    pub fn s3_with_credentials(
        url: &str,
        options: RemoteOptions,
        access_key_id: &str,
        secret_access_key: &str,
    ) -> Result<Self, OpenError> {
        let builder = AmazonS3Builder::from_env()
            .with_access_key_id(access_key_id)
            .with_secret_access_key(secret_access_key);
        Self::s3_from(url, options, builder)
    }

    fn s3_from(
        url: &str,
        options: RemoteOptions,
        mut builder: AmazonS3Builder,
    ) -> Result<Self, OpenError> {
        let wrong = |reason: String| OpenError::Option {
            option: "object storage",
            reason: format!("{url}: {reason}"),
        };
        let rest =
            url.strip_prefix("s3://").ok_or_else(|| wrong("not s3://BUCKET/PREFIX".into()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        // The one cryptography that is linked; another choice of the program's stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint).unwrap_or_default();
        let client = ClientOptions::new()
            .with_allow_http(endpoint.starts_with("http://"))
            .with_timeout(options.timeout);
        let store = builder
            .with_bucket_name(bucket)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() })
            .with_client_options(client)
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        Self::over(Arc::new(store), prefix, url.to_owned(), options)
    }

    /// Over any object store that has conditional writes; `place` names it in messages.
    ///
    /// # Errors
    /// If the runtime cannot be started.
    pub fn over(
        store: Arc<dyn ObjectStore>,
        prefix: &str,
        place: String,
        options: RemoteOptions,
    ) -> Result<Self, OpenError> {
        let failed = |e: std::io::Error| OpenError::Option {
            option: "object storage",
            reason: format!("its thread cannot be started: {e}"),
        };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("ampoule-store".to_owned())
            .spawn(move || {
                let _ = runtime.block_on(stopped);
            })
            .map_err(failed)?;
        Ok(Self {
            store,
            prefix: Path::from(prefix),
            place,
            options,
            runtime: handle,
            stop: Some(stop),
            thread: Some(thread),
            retries: AtomicU64::new(0),
        })
    }

    /// How many requests were tried again so far.
    pub fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    fn path(&self, key: &Key) -> Path {
        key.to_string().split('/').fold(self.prefix.clone(), Path::join)
    }

    /// Runs one request on the runtime's thread and waits for it.
    fn wait<T: Send + 'static>(
        &self,
        request: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            let _ = send.send(request.await);
        });
        receive.recv().unwrap_or_else(|_| {
            Err(Error::Generic { store: "runtime", source: "the request was given up".into() })
        })
    }

    fn gave_up(
        &self,
        action: &'static str,
        object: String,
        tries: u32,
        error: &Error,
    ) -> StorageError {
        let mut reason = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(error) = source {
            let text = error.to_string();
            if !reason.contains(&text) {
                reason = format!("{reason}: {text}");
            }
            source = error.source();
        }
        StorageError::Remote { action, object, place: self.place.clone(), tries, reason }
    }

    fn pause(&self, failed: u32) {
        self.retries.fetch_add(1, Ordering::Relaxed);
        let full = self.options.backoff.saturating_mul(1 << failed.min(16)).min(MAX_BACKOFF);
        // Between half and all of it, so that many who failed together do not come back together.
        let jitter = getrandom::u32().map_or(1.0, |r| f64::from(r) / f64::from(u32::MAX));
        std::thread::sleep(full.mul_f64(0.5 + jitter / 2.0));
    }

    /// Tries an idempotent request until it succeeds, or fails in a way that trying again does not change.
    fn request<T: Send + 'static, F>(
        &self,
        action: &'static str,
        object: &dyn ToString,
        request: impl Fn() -> F,
    ) -> Result<Option<T>, StorageError>
    where
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let mut failed = 0;
        loop {
            match self.wait(request()) {
                Ok(result) => return Ok(Some(result)),
                Err(Error::NotFound { .. }) => return Ok(None),
                Err(error) => {
                    failed += 1;
                    if failed >= self.options.tries || is_final(&error) {
                        return Err(self.gave_up(action, object.to_string(), failed, &error));
                    }
                    self.pause(failed - 1);
                }
            }
        }
    }

    /// Checks with a throw-away object that conditional writes are refused when they must be.
    fn probe(&self) -> Result<(), OpenError> {
        let random = getrandom::u64().unwrap_or_default();
        let key = Key::new(Folder::Root, format!("probe-{random:016x}"));
        let enforced = |refused: bool, what: &'static str| {
            if refused {
                Ok(())
            } else {
                Err(OpenError::NoConditionalWrites { place: self.place.clone(), what })
            }
        };
        let run = || -> Result<(), OpenError> {
            let write = |expected: Option<&Version>, text: &str| {
                self.swap(&key, expected, format!("{text} {random:016x}").as_bytes())
            };
            let read = || self.read_version(&key, 1 << 16);
            let known = "a write of its own was refused";
            enforced(write(None, "first")? == Swapped::Yes, known)?;
            let create = "If-None-Match: a write that must not replace an object did";
            enforced(write(None, "second")? == Swapped::No, create)?;
            let (bytes, version) = read()?.ok_or_else(|| OpenError::NoConditionalWrites {
                place: self.place.clone(),
                what: "an object that was just written cannot be read",
            })?;
            enforced(bytes.starts_with(b"first"), create)?;
            enforced(write(Some(&version), "third")? == Swapped::Yes, known)?;
            let update = "If-Match: a write over a newer version went through";
            enforced(write(Some(&version), "fourth")? == Swapped::No, update)?;
            let after = read()?.map(|(bytes, _)| bytes).unwrap_or_default();
            enforced(after.starts_with(b"third"), update)
        };
        let result = run();
        let removed = self.remove(&key);
        result?;
        Ok(removed?)
    }
}

/// Whether trying again cannot help.
const fn is_final(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidPath { .. }
            | Error::NotSupported { .. }
            | Error::NotImplemented { .. }
            | Error::PermissionDenied { .. }
            | Error::Unauthenticated { .. }
            | Error::UnknownConfigurationKey { .. }
    )
}

impl Drop for RemoteStorage {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Storage for RemoteStorage {
    fn describe(&self) -> String {
        self.place.clone()
    }

    fn single_writer(&self) -> bool {
        false
    }

    fn begin_writing(&self) -> Result<(), OpenError> {
        self.probe()
    }

    fn put(&self, key: &Key, pieces: &[&[u8]]) -> Result<(), StorageError> {
        let path = self.path(key);
        let payload = PutPayload::from(pieces.concat());
        self.request("write", key, || {
            let (store, path, payload) = (Arc::clone(&self.store), path.clone(), payload.clone());
            async move { store.put(&path, payload).await }
        })?;
        Ok(())
    }

    fn flush(&self, _: &[Folder]) -> Result<(), StorageError> {
        // A write that was answered is durable.
        Ok(())
    }

    fn stat(&self, key: &Key) -> Result<Option<u64>, StorageError> {
        let path = self.path(key);
        let found = self.request("look up", key, || {
            let (store, path) = (Arc::clone(&self.store), path.clone());
            async move { store.head(&path).await }
        })?;
        Ok(found.map(|meta| meta.size))
    }

    fn open(&self, key: &Key, limit: u64) -> Result<Option<Box<dyn Object>>, StorageError> {
        let read = self.read_version(key, limit)?;
        Ok(read.map(|(bytes, _)| Box::new(bytes) as Box<dyn Object>))
    }

    fn read_version(
        &self,
        key: &Key,
        limit: u64,
    ) -> Result<Option<(Vec<u8>, Version)>, StorageError> {
        let path = self.path(key);
        self.request("read", key, || {
            let (store, path) = (Arc::clone(&self.store), path.clone());
            async move {
                let found = store.get(&path).await?;
                if found.meta.size > limit {
                    let source =
                        format!("it has {} bytes, at most {limit} are allowed", found.meta.size);
                    return Err(Error::NotSupported { source: source.into() });
                }
                let version = found.meta.e_tag.clone().unwrap_or_default();
                let bytes = found.bytes().await?;
                Ok((Vec::from(bytes), Version(version)))
            }
        })
    }

    fn swap(
        &self,
        key: &Key,
        expected: Option<&Version>,
        bytes: &[u8],
    ) -> Result<Swapped, StorageError> {
        let path = self.path(key);
        let mode = expected.map_or(PutMode::Create, |version| {
            PutMode::Update(UpdateVersion { e_tag: Some(version.0.clone()), version: None })
        });
        let payload = PutPayload::from(bytes.to_vec());
        let mut failed = 0;
        loop {
            let (store, path, payload) = (Arc::clone(&self.store), path.clone(), payload.clone());
            let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
            let put = self.wait(async move { store.put_opts(&path, payload, options).await });
            let error = match put {
                Ok(_) => return Ok(Swapped::Yes),
                Err(
                    error @ (Error::AlreadyExists { .. }
                    | Error::Precondition { .. }
                    | Error::NotModified { .. }),
                ) => {
                    // Somebody else was faster; or an earlier try of this very write went through and its answer was
                    // lost. No two writes of a head have the same bytes, so they tell.
                    let found = self.read_version(key, u64::MAX)?;
                    match &found {
                        Some((there, _)) if there == bytes => return Ok(Swapped::Yes),
                        _ => {}
                    }
                    let unchanged = found.as_ref().map(|(_, version)| version) == expected;
                    if !unchanged {
                        return Ok(Swapped::No);
                    }
                    // Nothing changed: two writes met (409), and this one was sent away to try again.
                    error
                }
                Err(error) => error,
            };
            failed += 1;
            if failed >= self.options.tries || is_final(&error) {
                return Err(self.gave_up("write", key.to_string(), failed, &error));
            }
            self.pause(failed - 1);
        }
    }

    fn list(&self, folder: Folder) -> Result<Vec<Entry>, StorageError> {
        let prefix = match folder.name() {
            "" => self.prefix.clone(),
            name => self.prefix.clone().join(name),
        };
        let listed = self.request("list", &folder_name(folder), || {
            let (store, prefix) = (Arc::clone(&self.store), prefix.clone());
            async move { store.list_with_delimiter(Some(&prefix)).await }
        })?;
        let entry = |meta: object_store::ObjectMeta| Entry {
            name: meta.location.filename().unwrap_or_default().to_owned(),
            bytes: meta.size,
            modified: meta.last_modified.into(),
        };
        Ok(listed.map(|l| l.objects.into_iter().map(entry).collect()).unwrap_or_default())
    }

    fn remove(&self, key: &Key) -> Result<(), StorageError> {
        let path = self.path(key);
        self.request("remove", key, || {
            let (store, path) = (Arc::clone(&self.store), path.clone());
            async move { store.delete(&path).await }
        })?;
        Ok(())
    }

    fn now(&self) -> Result<SystemTime, StorageError> {
        let key =
            Key::new(Folder::Root, format!("clock-{:016x}", getrandom::u64().unwrap_or_default()));
        self.put(&key, &[b"what time is it"])?;
        let path = self.path(&key);
        let found = self.request("look up", &key, || {
            let (store, path) = (Arc::clone(&self.store), path.clone());
            async move { store.head(&path).await }
        });
        self.remove(&key)?;
        // An object that was written and is gone: somebody cleaned up; this machine's clock must do.
        Ok(found?.map_or_else(SystemTime::now, |meta| meta.last_modified.into()))
    }
}
