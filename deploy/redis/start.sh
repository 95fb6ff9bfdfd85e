#!/bin/sh
# Start Redis with one user per side:
#   annotator  template banks and keys (vessa:bank:*, vessa:blobs:*, vessa:banks, vessa:keys), no labels
#   trainer    labels (vessa:label:*, vessa:claim:*), no banks and no keys
#   health     PING alone, without a password
# Each password is in a file /passwords/USER/password, so that no command line and no environment shows it. A
# missing file is filled with a generated password that the account 10001 of the other containers may read.
set -eu
umask 077

password() {  # user
    folder=/passwords/$1
    if [ ! -s "$folder/password" ]; then
        head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$folder/password"
        chmod 0400 "$folder/password"
        chown -R 10001:10001 "$folder"
    fi
    sha256sum < "$folder/password" | cut -d ' ' -f 1
}

cat > /tmp/users.acl <<USERS
user default off
user health on nopass -@all +ping
user annotator on #$(password annotator) resetkeys ~vessa:bank:* ~vessa:blobs:* ~vessa:banks ~vessa:keys resetchannels -@all +@read +@write +@hash +@set +@transaction +ping +select -@dangerous +info +config|get +bgrewriteaof
user trainer on #$(password trainer) resetkeys ~vessa:label:* ~vessa:claim:* resetchannels -@all +@read +@write +@string +@transaction +ping +select +scan -@dangerous +info
USERS

chmod 0644 /tmp/users.acl  # it holds hashes alone, and Redis reads it as another account
# The image's entry point starts Redis under an account of its own where this one is root.
start=$(command -v docker-entrypoint.sh || true)
exec $start redis-server \
    --aclfile /tmp/users.acl \
    --maxmemory "${REDIS_MEMORY:-1gb}" \
    --maxmemory-policy volatile-lru \
    --appendonly yes \
    --appendfsync everysec \
    --dir /data
