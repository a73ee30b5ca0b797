#!/bin/sh
# completion.sh prints the completion of a shell, made of what HAMLET, the binary,
# says in its help:
#
#   completion.sh bash HAMLET
#   completion.sh zsh HAMLET
#
# It completes commands, options, and values that are always the same. Names of
# members are not among them: a shell would expand what another machine has chosen.
set -eu
export LC_ALL=C
hamlet=$2

commands() { "$hamlet" help | sed -n '/^Commands:/,/^$/s/^  //p'; }
names() { commands | while read -r name _; do printf '%s ' "$name"; done; }
options() { "$hamlet" help "$1" | sed -n 's/^  \(-[a-z-]*\).*/\1/p' | tr '\n' ' '; }

bash_completion() {
	cat <<'END'
# Completion of hamlet for bash.
_hamlet() {
	local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=
	case $COMP_CWORD:$before in
END
	printf '\t1:* | *:help) words="%shelp" ;;\n' "$(names)"
	cat <<'END'
	*:-format) words="text json" ;;
	*:-log-level) words="trace debug info warn err" ;;
	*:-config-file | *:-config-dir | *:-event-handler) ;; # files
	*) case ${COMP_WORDS[1]} in
END
	commands | while read -r name _; do
		printf '\t\t%s) words="%s" ;;\n' "$name" "$(options "$name")"
	done
	cat <<'END'
		esac ;;
	esac
	COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _hamlet hamlet
END
}

zsh_completion() {
	cat <<'END'
#compdef hamlet
# Completion of hamlet for zsh.
_hamlet() {
	local -a commands
	commands=(
END
	commands | while read -r name short; do
		printf "\t\t'%s:%s'\n" "$name" "$(printf %s "$short" | tr -d "':[]")"
	done
	cat <<'END'
		'help:shows how to use a command'
	)
	if ((CURRENT == 2)) || [[ $words[2] == help ]]; then
		_describe command commands
		return
	fi
	local command=$words[2]
	shift words
	((CURRENT--))
	case $command in
END
	commands | while read -r name _; do
		printf '\t%s) _arguments' "$name"
		"$hamlet" help "$name" | awk '
		function plain(s) {
			gsub(/\\/, "", s)
			gsub(/:|\[|\]/, "\\\\&", s)
			gsub(/\047/, "\047\\\047\047", s)
			return s
		}
		function flush() {
			if (option == "") return
			star = all ~ /repeatable/ ? "*" : ""
			sub(/(;| \().*/, "", all)
			values = option == "-format" ? "(text json)" : option == "-log-level" ? "(trace debug info warn err)" : " "
			if (option == "-config-file") values = "_files"
			if (option == "-config-dir") values = "_files -/"
			printf " \\\n\t\t\047%s%s[%s]%s\047", star, option, plain(all), arg == "" ? "" : ":" plain(arg) ":" values
			option = all = arg = ""
		}
		/^  -/ { flush(); option = $1; arg = $2; next }
		/^    \t/ && option != "" { sub(/^    \t/, ""); all = all (all == "" ? "" : " ") $0; next }
		END { flush() }'
		printf ' ;;\n'
	done
	printf '\tesac\n}\n_hamlet "$@"\n'
}

case $1 in
bash | zsh) "$1_completion" ;;
*) echo "usage: $0 bash|zsh HAMLET" >&2 && exit 2 ;;
esac
