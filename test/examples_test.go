package test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const slowAnswer = 300 * time.Millisecond

// webServer is the server behind HAProxy, in a process of its own. It answers
// with its name until it is told to stop; then it finishes what it has begun.
func webServer(addr, name string) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			time.Sleep(slowAnswer)
		}
		io.WriteString(w, name)
	})
	server := &http.Server{Addr: addr, Handler: mux}
	told, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}()
	<-told.Done()
	server.Shutdown(context.Background())
}

// exampleEnv is an environment in which hamlet is this program.
func exampleEnv(t *testing.T, dir string, kv ...string) []string {
	t.Helper()
	if err := os.Symlink(program, filepath.Join(dir, "hamlet")); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	return slices.Concat(hamletCmd().Env, []string{"PATH=" + dir + ":" + os.Getenv("PATH")}, kv)
}

func writeScript(t *testing.T, path, body string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// --- examples/haproxy, with a hamlet that shows what the test wants

// balancer runs balance.sh, that of HAProxy or nginx, in a directory of its own.
type balancer struct {
	t             *testing.T
	dir           string
	shell, script string
	env           []string
}

func newBalancer(t *testing.T, shell, program string) *balancer {
	t.Helper()
	if _, err := exec.LookPath("flock"); err != nil {
		t.Skip("SKIPPED: there is no flock here, which balance.sh uses")
	}
	b := &balancer{t: t, dir: t.TempDir(), shell: shell, script: "examples/" + program + "/balance.sh"}
	writeScript(t, filepath.Join(b.dir, "hamlet"), `echo "$*" >>"$DIR/asked"; cat "$DIR/members"`)
	writeScript(t, filepath.Join(b.dir, "sleep"), `:`)
	b.env = append(hamletCmd().Env, "DIR="+b.dir, "PATH="+b.dir+":"+os.Getenv("PATH"),
		"BALANCE_LIST="+filepath.Join(b.dir, "web.cfg"), "BALANCE_RELOAD=echo reload >>$DIR/reloads; ! test -e $DIR/broken")
	return b
}

// alive sets what hamlet shows: lines of names, IPs and tags.
func (b *balancer) alive(members ...string) {
	b.t.Helper()
	text := ""
	for _, m := range members {
		f := strings.Fields(m)
		text += fmt.Sprintf("%s    %-14s    alive     %s\n", f[0], net.JoinHostPort(f[1], "7946"), f[2])
	}
	if err := os.WriteFile(filepath.Join(b.dir, "members"), []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *balancer) run() (output string, err error) {
	cmd := exec.Command(b.shell, b.script)
	cmd.Env = b.env
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// want runs the handler and compares the list and the number of reloads until now.
func (b *balancer) want(list string, reloads int) {
	b.t.Helper()
	if out, err := b.run(); err != nil {
		b.t.Errorf("%v: %s", err, out)
	}
	b.wantNow(list, reloads)
}

func (b *balancer) wantNow(list string, reloads int) {
	b.t.Helper()
	if diff := cmp.Diff(list, readFile(filepath.Join(b.dir, "web.cfg"))); diff != "" {
		b.t.Errorf("the list (-want +got):\n%s", diff)
	}
	if n := strings.Count(readFile(filepath.Join(b.dir, "reloads")), "reload"); n != reloads {
		b.t.Errorf("%d reloads until now, want %d", n, reloads)
	}
}

func TestHAProxyReloadsOnlyWhenTheMembersChanged(t *testing.T) {
	t.Parallel()
	b := newBalancer(t, "/bin/sh", "haproxy")
	const web1, web2, web3 = "web1 10.0.0.1 role=web", "web2 10.0.0.2 port=81,role=web,zone=b", "web3 fd00::3 a=b,c,report=99,role=web"
	const two = "backend web\n    server web1-10.0.0.1:8080 10.0.0.1:8080\n    server web2-10.0.0.2:81 10.0.0.2:81\n"
	const three = two + "    server web3-_fd00::3_:8080 [fd00::3]:8080\n"

	b.alive(web2, web1)
	b.want(two, 1)
	if asked := readFile(filepath.Join(b.dir, "asked")); asked != "members -format text -status alive -tag role=web\n" {
		t.Errorf("it asked for %q", asked)
	}
	before, _ := os.Stat(filepath.Join(b.dir, "web.cfg"))
	b.alive(web1, web2)
	b.want(two, 1)
	if after, _ := os.Stat(filepath.Join(b.dir, "web.cfg")); !os.SameFile(before, after) {
		t.Error("an unchanged list was written again")
	}

	b.alive(web1, web2, web3)
	writeScript(t, filepath.Join(b.dir, "cmp"), `PATH=${PATH#*:}; cmp "$@"; differ=$?; sleep 0.1; exit $differ`) // time for the others
	var burst sync.WaitGroup
	for range 4 {
		burst.Go(func() {
			if out, err := b.run(); err != nil {
				t.Errorf("in a burst: %v: %s", err, out)
			}
		})
	}
	burst.Wait()
	os.Remove(filepath.Join(b.dir, "cmp"))
	b.wantNow(three, 2)

	b.alive() // the agent has just started, or is cut off
	b.want(three, 2)
	os.Remove(filepath.Join(b.dir, "members")) // the agent has ended
	if _, err := b.run(); err == nil {
		t.Error("without an agent it did not fail")
	}
	b.wantNow(three, 2)

	broken := filepath.Join(b.dir, "broken")
	b.alive(web1, web2)
	os.WriteFile(broken, nil, 0o644)
	if _, err := b.run(); err == nil {
		t.Error("a reload that failed was not told")
	}
	os.Remove(broken)
	b.want(two, 4) // it is tried again, though the list is the same
	b.want(two, 4)
}

func TestHAProxyLeavesOutMembersThatDrain(t *testing.T) {
	t.Parallel()
	const web1, web2 = "web1 10.0.0.1 role=web", "web2 10.0.0.2 port=81,role=web"
	const drain1, drain2 = "web1 10.0.0.1 role=web,state=drain,zone=b", "web2 10.0.0.2 port=81,role=web,state=drain"
	const server1, server2 = "    server web1-10.0.0.1:8080 10.0.0.1:8080\n", "    server web2-10.0.0.2:81 10.0.0.2:81\n"
	eachShell(t, func(t *testing.T, shell string) {
		b := newBalancer(t, shell, "haproxy")
		for i, step := range []struct {
			alive []string
			want  string
		}{
			{[]string{web1, web2}, server1 + server2},
			{[]string{web1, drain2}, server1},
			{[]string{drain1, web2}, server2},
			{[]string{drain1, drain2}, server1 + server2}, // nobody else is there
			{[]string{drain1, web2}, server2},
			{[]string{drain1}, server1}, // what the list held has died
			{[]string{"web1 10.0.0.1 laststate=drain,role=web", "web2 10.0.0.2 port=81,role=web,state=drained"}, server1 + server2},
			{[]string{web1, drain2}, server1},
		} {
			b.alive(step.alive...)
			b.want("backend web\n"+step.want, 1+i)
		}
		b.alive(drain1, drain2)
		out, err := b.run()
		if err != nil || !strings.HasPrefix(out, "all members with role=web are draining: they serve on\n") {
			t.Errorf("when all drain: %q, %v", out, err)
		}
	})
}

func TestHAProxyHandlerWaitsWhileItStillLoads(t *testing.T) {
	t.Parallel()
	needProc(t)
	b := newBalancer(t, "/bin/sh", "haproxy")
	pid, reloads := filepath.Join(b.dir, "pid"), filepath.Join(b.dir, "reloads")
	b.env = append(b.env, "BALANCE_RELOAD=", "BALANCE_PID="+pid)
	b.alive("web1 10.0.0.1 role=web")
	if err := os.WriteFile(pid, []byte("999999999\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	writeScript(t, filepath.Join(b.dir, "seq"), "echo 1 2 3") // tries
	if out, err := b.run(); err == nil || !strings.Contains(out, "HAProxy is not there") {
		t.Errorf("without HAProxy: %q, %v", out, err)
	}
	os.Remove(filepath.Join(b.dir, "seq"))
	os.Remove(filepath.Join(b.dir, "sleep"))

	shell, err := filepath.EvalSymlinks("/bin/sh")
	if err == nil {
		err = os.Symlink(shell, filepath.Join(b.dir, "haproxy"))
	}
	if err != nil {
		t.Fatal(err)
	}
	script := "trap '' USR2; echo $$ >" + pid + "; sleep 0.3; trap 'echo reload >>" + reloads + "' USR2; while :; do sleep 0.02; done"
	fake := exec.Command(filepath.Join(b.dir, "haproxy"), "-c", script)
	fake.Args[0] = "sh" // for a busybox, which looks there
	os.Remove(pid)
	if err := fake.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fake.Process.Kill(); fake.Wait() })
	pidIn(t, pid)
	if out, err := b.run(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	eventually(t, "HAProxy reloads", func() bool { return readFile(reloads) == "reload\n" })
}

// Real agents, and the real members command in front of the script.
func TestBalancerIsNotConfiguredByNamesAndTagsOfPeers(t *testing.T) {
	t.Parallel()
	lb := startAgent(t, "-node", "lb")
	count := 0
	start := func(net int, name, port string) {
		count++
		args := []string{"-node=" + name, "-bind", fmt.Sprintf("127.0.%d.%d:0", net, count), "-join", lb.advertised, "-role", "web"}
		if net == 2 {
			args = append(args, "-tag", "port="+port)
		}
		cmd := hamletCmd(agentArgs(args...)...)
		cmd.Path = asker // there are many
		startAgentCmd(t, cmd)
	}
	for _, name := range []string{"web0", `a;b`, `a"b`, `a'b`, `$(reboot)`, "`reboot`", `x\n10.0.0.9:1\tserver`, `x\x0aserver`, `\c`, `#`, `-n`, `%s%n`,
		`${HOME}`, `web1`, `ウェブ`, `サーバ`, `backend`, `/../`, `*`, `a,port=22`, `x\`, strings.Repeat("n", 128)} {
		start(1, name, "")
	}
	good := count
	for i, port := range []string{"80 check", "80\nserver x 10.0.0.9:80", "80;", "0", "65536", "99999999999999999999", "-1", "", "0x50", "8e1", "$p"} {
		start(2, fmt.Sprint("port", i), port)
	}
	eventually(t, "all are members", func() bool { return len(lb.members()) == 1+count })
	line := regexp.MustCompile(`^    server [A-Za-z0-9_.:-]+-(127\.0\.1\.\d+:8080) (127\.0\.1\.\d+:8080)$`)
	nginxLine := regexp.MustCompile(`^server 127\.0\.1\.\d+:8080;$`)
	list, nginxList := "", ""
	eachShell(t, func(t *testing.T, shell string) {
		written := func(program string) (list string, lines []string) {
			t.Helper()
			b := newBalancer(t, shell, program)
			os.Remove(filepath.Join(b.dir, "hamlet"))
			b.env = append(exampleEnv(t, b.dir, b.env...), "SERF_RPC_ADDR="+lb.rpc)
			if out, err := b.run(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			list = readFile(filepath.Join(b.dir, "web.cfg"))
			return list, strings.Split(strings.TrimSuffix(list, "\n"), "\n")
		}
		var lines []string
		list, lines = written("haproxy")
		if lines[0] != "backend web" || len(lines) != 1+good {
			t.Errorf("%d lines, want 1 and %d servers:\n%s", len(lines), good, list)
		}
		for _, l := range lines[1:] {
			if m := line.FindStringSubmatch(l); m == nil || m[1] != m[2] {
				t.Errorf("not as it should be: %q", l)
			}
		}
		nginxList, lines = written("nginx")
		if len(lines) != good {
			t.Errorf("%d lines, want %d servers:\n%s", len(lines), good, nginxList)
		}
		for _, l := range lines {
			if !nginxLine.MatchString(l) {
				t.Errorf("not as it should be: %q", l)
			}
		}
	})
	if nginx := lookNginx(); nginx != "" {
		dir := t.TempDir()
		os.WriteFile(filepath.Join(dir, "web.servers"), []byte(nginxList), 0o644)
		if out, err := exec.Command(nginx, "-t", "-p", dir, "-c", ownNginxConfig(t, dir, freePort(t))).CombinedOutput(); err != nil {
			t.Errorf("nginx: %v: %s", err, out)
		}
	}
	if _, err := exec.LookPath("haproxy"); err == nil {
		written := filepath.Join(t.TempDir(), "web.cfg")
		os.WriteFile(written, []byte(list), 0o644)
		if out, err := exec.Command("haproxy", "-c", "-f", ownHAProxyConfig(t, t.TempDir(), ":80"), "-f", written).CombinedOutput(); err != nil {
			t.Errorf("HAProxy: %v: %s", err, out)
		}
	}
}

// ownHAProxyConfig is the example's file, with another address and (where this is
// not root's process) without the change of user.
func ownHAProxyConfig(t *testing.T, dir, addr string) (path string) {
	t.Helper()
	text := strings.Replace(readFile("examples/haproxy/haproxy.cfg"), "    bind :80\n", "    bind "+addr+"\n", 1)
	if !strings.Contains(text, "    bind "+addr+"\n") {
		t.Fatal("the example does not bind to :80 any more")
	}
	if os.Getuid() != 0 {
		text = regexp.MustCompile(`(?m)^ +(user|group) .*\n`).ReplaceAllString(text, "")
	}
	path = filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestWebNodeStopsWithItsServerItsAgentOrASignal(t *testing.T) {
	t.Parallel()
	lb := startAgent(t, "-node", "lb")
	for name, stop := range map[string]func(script *exec.Cmd, server int, rpc string) (exit int){
		"server": func(_ *exec.Cmd, server int, _ string) int { syscall.Kill(server, syscall.SIGKILL); return 1 },
		"agent":  func(_ *exec.Cmd, _ int, rpc string) int { hamlet(t, "leave", "-rpc-addr", rpc); return 1 },
		"signal": func(script *exec.Cmd, _ int, _ string) int { script.Process.Signal(syscall.SIGTERM); return 0 },
		"ctrl-c": func(script *exec.Cmd, _ int, _ string) int {
			syscall.Kill(-script.Process.Pid, syscall.SIGINT)
			return 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, rpc := t.TempDir(), freePort(t)
			pid := filepath.Join(dir, "pid")
			cmd := exec.Command("examples/haproxy/web.sh", "80", "sh", "-c", "echo $$ >"+pid+"; exec sleep 60")
			cmd.Env = exampleEnv(t, dir, "HAMLET_NODE="+name, "HAMLET_BIND=127.0.0.1:0", "HAMLET_RPC_ADDR="+rpc, "HAMLET_JOIN="+lb.advertised, "DRAIN=0")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
			eventually(t, name+" is a member with its port", func() bool {
				tags := lb.member(name).Tags
				return tags["role"] == "web" && tags["port"] == "80"
			})
			want := stop(cmd, pidIn(t, pid), rpc)
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != want {
				t.Errorf("exit status %d, want %d", got, want)
			}
			if n := groupAlive(cmd.Process.Pid); n > 1 { // one: what it slept in
				t.Errorf("%d processes are left", n)
			}
			lb.waitStatus(name, "left")
		})
	}
}

// --- examples/nginx

// lookNginx is where nginx is installed; "" is nowhere.
func lookNginx() string {
	for _, name := range []string{"nginx", "/usr/sbin/nginx"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

// ownNginxConfig is the example's file in a whole configuration, with another address
// and the list of servers beside it.
func ownNginxConfig(t *testing.T, dir, addr string) (path string) {
	t.Helper()
	site := strings.NewReplacer("listen 80;", "listen "+addr+";", "/etc/nginx/web.servers", filepath.Join(dir, "web.servers")).
		Replace(readFile("examples/nginx/web.conf"))
	if !strings.Contains(site, "listen "+addr+";") || !strings.Contains(site, dir) {
		t.Fatal("the example listens elsewhere, or reads another list")
	}
	text := "pid " + dir + "/nginx.pid;\nerror_log " + dir + "/error.log;\nevents {}\nhttp {\naccess_log off;\n"
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		text += kind + "_temp_path " + dir + "/" + kind + ";\n"
	}
	path = filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(text+site+"}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNginxReloadsOnlyWhenTheMembersChanged(t *testing.T) {
	t.Parallel()
	const web1, web2, drain1 = "web1 10.0.0.1 role=web", "web2 fd00::2 port=81,role=web", "web1 10.0.0.1 role=web,state=drain"
	const server1, server2 = "server 10.0.0.1:8080;\n", "server [fd00::2]:81;\n"
	eachShell(t, func(t *testing.T, shell string) {
		b := newBalancer(t, shell, "nginx")
		b.alive(web2, web1)
		b.want(server1+server2, 1)
		b.alive(web1, web2)
		b.want(server1+server2, 1)
		b.alive(drain1, web2)
		b.want(server2, 2)
		b.alive(drain1) // nobody else is there
		b.want(server1, 3)
		b.alive() // the agent has just started, or is cut off
		b.want(server1, 3)

		broken := filepath.Join(b.dir, "broken")
		b.alive(web1, web2)
		os.WriteFile(broken, nil, 0o644)
		if _, err := b.run(); err == nil {
			t.Error("a reload that failed was not told")
		}
		os.Remove(broken)
		b.want(server1+server2, 5) // it is tried again, though the list is the same
	})
}

// The real nginx, with a handler's reloads: a server that drains loses no request,
// and one whose agent is killed is asked no more.
func TestNginxFollowsTheCluster(t *testing.T) {
	t.Parallel()
	nginx := lookNginx()
	if nginx == "" {
		t.Skip("SKIPPED: nginx is not installed")
	}
	dir, addr := t.TempDir(), freePort(t)
	os.Chmod(dir, 0o755)
	os.WriteFile(filepath.Join(dir, "web.servers"), []byte("server 127.0.0.1:9;\n"), 0o644)
	config := ownNginxConfig(t, dir, addr)
	server := exec.Command(nginx, "-p", dir, "-c", config, "-g", "daemon off;")
	log := &output{}
	server.Stdout, server.Stderr = log, log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Process.Signal(syscall.SIGTERM)
		server.Wait()
		if t.Failed() {
			t.Logf("nginx:\n%s%s", log, readFile(filepath.Join(dir, "error.log")))
		}
	})
	pidIn(t, filepath.Join(dir, "nginx.pid"))

	handler, _ := filepath.Abs("examples/nginx/balance.sh")
	cmd := hamletCmd(agentArgs("-node", "lb", "-event-handler", "member-join,member-leave,member-failed,member-update="+handler)...)
	cmd.Env = exampleEnv(t, dir, "BALANCE_LIST="+filepath.Join(dir, "web.servers"), "BALANCE_RELOAD="+nginx+" -p "+dir+" -c "+config+" -s reload")
	lb := startAgentCmd(t, cmd)
	nodes := make(map[string]*agent)
	for _, name := range []string{"web1", "web2"} {
		web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, name) }))
		t.Cleanup(web.Close)
		_, port, _ := net.SplitHostPort(web.Listener.Addr().String())
		nodes[name] = startAgent(t, "-node", name, "-role", "web", "-tag", "port="+port, "-join", lb.advertised)
	}

	client := &webClient{addr: addr, path: "/"}
	// answers asks some times, and counts answers by server.
	answers := func() map[string]int {
		t.Helper()
		from := make(map[string]int)
		for range 8 {
			name, err := client.get()
			if err != nil {
				name = err.Error()
			}
			from[name]++
		}
		return from
	}
	onlyFrom := func(what string, names ...string) {
		t.Helper()
		var last map[string]int
		eventually(t, what, func() bool {
			last = answers()
			for _, name := range names {
				if last[name] == 0 {
					return false
				}
			}
			return len(last) == len(names)
		})
	}
	onlyFrom("both serve", "web1", "web2")
	nodes["web1"].run("tags", "-set", "state=drain")
	deadline := time.Now().Add(10 * time.Second)
	for from := answers(); from["web1"] > 0; from = answers() {
		if from["web1"]+from["web2"] != 8 {
			t.Errorf("while web1 drains: %v", from)
		}
		if time.Now().After(deadline) {
			t.Fatalf("web1 drains and is asked still: %v", from)
		}
	}
	onlyFrom("web2 serves alone", "web2")
	nodes["web1"].run("tags", "-delete", "state")
	onlyFrom("both serve again", "web1", "web2")
	nodes["web2"].kill()
	onlyFrom("web1 serves alone", "web1")
}

// --- examples/handlers

func TestCatchAllHandlerRunsTheScriptOfTheEvent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "handlers"), os.DirFS("examples/handlers")); err != nil {
		t.Fatal(err)
	}
	writeScript(t, filepath.Join(dir, "git"), `echo "git $*"`)
	writeScript(t, filepath.Join(dir, "logger"), `echo "logger $*: $(cat)"`)
	os.Chmod(filepath.Join(dir, "handlers", "member-failed"), 0o755)
	if err := os.WriteFile(filepath.Join(dir, "handlers", "user-forgotten"), []byte("#!/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := hamletCmd(agentArgs("-node", "app1", "-log-level", "debug", "-event-handler", filepath.Join(dir, "handlers", "route.sh"))...)
	cmd.Env = exampleEnv(t, dir, "APP="+dir)
	app := startAgentCmd(t, cmd)
	app.waitLog("app1 joined from 127.0.0.1, role none\n\tapp1    " + app.advertised + "    alive\n")
	web := startAgent(t, "-node", "web1", "-role", "web", "-tag", "port=80", "-join", app.advertised)
	app.waitLog("web1 joined from 127.0.0.1, role web\n")
	app.waitStatus("web1", "alive")
	web.kill()
	app.waitLog("script output: logger -t hamlet -p daemon.err: web1 (127.0.0.1) failed\n")

	for _, event := range [][]string{{"deploy", "3f2c1aa"}, {"nobody-cares"}, {"forgotten"}, {"deploy", "--upload-pack=reboot"}, {"deploy", "3f\n2c"}, {"deploy"}} {
		if _, stderr, code := app.run("event", append([]string{"-coalesce=false"}, event...)...); code != 0 {
			t.Fatal(stderr)
		}
	}
	app.waitLog("git fetch --quiet\n\tgit checkout --quiet --detach 3f2c1aa\n\tapp1 runs 3f2c1aa\n")
	app.waitLog("failed on user:forgotten: exit status 126")
	app.waitLog("not a revision: --upload-pack=reboot\n")
	app.waitLog("not a revision: 3f\n\t2c\n")
	app.waitLog("not a revision: \n")
	if log := app.stderr.String(); strings.Contains(log, "nobody-cares: ") || strings.Count(log, "git checkout") != 1 {
		t.Errorf("an event without a script failed, or a bad revision was taken:\n%s", log)
	}
}

func TestCatchAllHandlerRunsNothingElsewhere(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	here := filepath.Join(dir, "handlers")
	if err := errors.Join(os.CopyFS(here, os.DirFS("examples/handlers")), os.Mkdir(filepath.Join(here, "user-x"), 0o755)); err != nil {
		t.Fatal(err)
	}
	writeScript(t, filepath.Join(dir, "evil"), "echo evil")
	writeScript(t, filepath.Join(dir, "user-evil"), "echo evil")
	for _, name := range []string{"ok", "$(evil)", "old.bak", ".hidden", "backup~", "a b", "é", "ok\nevil", "*", "-n", "ok-2_B"} {
		writeScript(t, filepath.Join(here, "user-"+name), "echo user "+strings.NewReplacer("$", "", "(", "", ")", "", "*", "", "\n", "").Replace(name))
		writeScript(t, filepath.Join(here, "query-"+name), "echo query; cat")
	}
	// Of all these scripts only those run whose names hold nothing but letters, digits, _ and -.
	runs := map[string]string{"ok": "user ok\n", "-n": "user -n\n", "ok-2_B": "user ok-2_B\n"}
	names := []string{"ok", "-n", "ok-2_B", "x/../../evil", "/../../evil", "../evil", "..", ".", "$(evil)", "`evil`", "", "a b", "*", "o?", "\n",
		"ok\nevil", "ok\n../evil", "old.bak", ".hidden", "backup~", "é", "~root", "ok ", "ok;evil", "'ok'", "o\\k", "${SERF_SELF_NAME}", "x", "nothing"}
	eachShell(t, func(t *testing.T, shell string) {
		for _, locale := range []string{"C", "C.UTF-8", "en_US.UTF-8"} {
			for _, name := range names {
				run := func(event string) string {
					cmd := exec.Command(shell, filepath.Join(here, "route.sh"))
					cmd.Env = append(hamletCmd().Env, "LC_ALL="+locale, "SERF_EVENT="+event, "SERF_SELF_NAME=ok", "SERF_USER_EVENT="+name, "SERF_QUERY_NAME="+name)
					cmd.Stdin = strings.NewReader("payload\n")
					out, err := cmd.CombinedOutput()
					if err != nil {
						t.Errorf("%s %q: %v", event, name, err)
					}
					return regexp.MustCompile(`(?m)^.*setlocale.*\n`).ReplaceAllString(string(out), "") // bash, where there is no such language
				}
				if got := run("user"); got != runs[name] {
					t.Errorf("%s: the event %q runs %q, want %q", locale, name, got, runs[name])
				}
				want := ""
				if runs[name] != "" {
					want = "query\npayload\n"
				}
				if got := run("query"); got != want {
					t.Errorf("%s: the query %q runs %q, want %q", locale, name, got, want)
				}
			}
		}
	})
}

// A query reaches the script of its name, as in Serf's recipe, and is answered by it.
func TestCatchAllHandlerAnswersQueries(t *testing.T) {
	t.Parallel()
	handler, _ := filepath.Abs("examples/handlers/route.sh")
	app := startAgent(t, "-node", "app1", "-event-handler", handler)
	out, stderr, code := app.run("query", "load")
	if code != 0 || !strings.Contains(out, "Response from 'app1': ") || !strings.Contains(out, "load average: ") {
		t.Errorf("exit %d: %s%s", code, out, stderr)
	}
}

func TestDeployHandlerTakesRevisionsOnly(t *testing.T) {
	t.Parallel()
	eachShell(t, func(t *testing.T, shell string) {
		dir := t.TempDir()
		writeScript(t, filepath.Join(dir, "git"), `printf '%s|' "$@" >>"$APP/calls"`)
		for _, file := range []string{"abc", "f00"} { // what a pattern could become
			os.WriteFile(filepath.Join(dir, file), nil, 0o644)
		}
		for _, locale := range []string{"C", "C.UTF-8", "en_US.UTF-8"} {
			for _, payload := range []string{"", "\n", "$(touch canary)", "`touch canary`", "--help", "-q", "abc\ntouch canary", "abc;touch canary", "HEAD", "abc def", "ABC",
				"abc\x00;id", "*", "[abc]", "???", "é", "ａ", "abc -f", "a/b"} {
				cmd := exec.Command(shell, "examples/handlers/user-deploy")
				cmd.Env = append(hamletCmd().Env, "LC_ALL="+locale, "APP="+dir, "SERF_SELF_NAME=me", "PATH="+dir+":"+os.Getenv("PATH"))
				cmd.Stdin = strings.NewReader(payload + "\n")
				if out, err := cmd.CombinedOutput(); err == nil {
					t.Errorf("%s: %q was taken: %s", locale, payload, out)
				}
			}
		}
		if calls := readFile(filepath.Join(dir, "calls")); calls != "" {
			t.Errorf("git was called: %q", calls)
		}
		if _, err := os.Stat(filepath.Join(dir, "canary")); err == nil {
			t.Error("a payload was run")
		}
	})
}

// People copy what is shown here and on the pages. Where a script expands what another
// machine has chosen, that stands in double quotes, or is an assignment or a case.
func TestScriptsQuoteWhatTheyExpand(t *testing.T) {
	t.Parallel()
	texts := make(map[string]string)
	for _, pattern := range []string{"examples/*.sh", "examples/*/*"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			texts[f] = readFile(f)
		}
	}
	for path, text := range pages(t) {
		texts[path] = strings.Join(regexp.MustCompile("(?ms)^```.*?^```$").FindAllString(text, -1), "\n")
	}
	for _, name := range commandNames(t) {
		texts["help "+name] = helpOf(t, name)
	}
	foreign := regexp.MustCompile(`\$\((cat|hamlet [a-z][^)]*)\)|\$\{?(SERF_(USER|QUERY|EVENT|SELF|TAG)\w*|name|revision|members|line|message)\b`)
	harmless := regexp.MustCompile(`(^|[;)])\s*\w+=(\$\([^)]*\))?[^\s"]*$|\bcase $|#.*$`)
	found := 0
	for where, text := range texts {
		for line := range strings.Lines(text) {
			for _, at := range foreign.FindAllStringIndex(line, -1) {
				before := line[:at[0]]
				found++
				if strings.Count(before, `"`)%2 == 0 && !harmless.MatchString(before) {
					t.Errorf("%s: unquoted: %s", where, line)
				}
			}
		}
	}
	if found < 15 {
		t.Errorf("only %d expansions were looked at", found)
	}
}

// --- examples/watch

// missing is a run of missing.sh, and what it would tell a person.
type missing struct {
	output
	pid int
}

func startMissing(t *testing.T, shell string, env []string) *missing {
	t.Helper()
	m := &missing{}
	cmd := exec.Command(shell, "examples/watch/missing.sh", "2", "printf", `%s\n`)
	cmd.Env, cmd.Stdout = env, m
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.pid = cmd.Process.Pid
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		syscall.Kill(-m.pid, syscall.SIGKILL)
		<-ended
	})
	return m
}

// tells waits until a member is told of, and counts how often it is by then.
func (m *missing) tells(t *testing.T, name, addr string) (n int) {
	t.Helper()
	eventually(t, "missing.sh tells of "+name, func() bool {
		n = strings.Count(m.String(), "failed 2 s ago and is not back: "+name+" "+addr+"\n")
		return n > 0
	})
	return n
}

func TestMissingScriptTellsOnceOfMembersThatStayAway(t *testing.T) {
	t.Parallel()
	needProc(t)
	hub := startAgent(t, "-node", "hub")
	rpc := freePort(t)
	watched := startAgent(t, "-node", "watched", "-rpc-addr", rpc, "-join", hub.advertised)
	peers := make(map[string]*agent)
	const hostile, tick = "-n;$(reboot)`reboot`%s\\n*'\"", "tick"
	for _, name := range []string{"gone", "returns", hostile, tick, "leaves", "late"} {
		peers[name] = startAgent(t, "-node="+name, "-join", hub.advertised, "-tag", "note=x failed y")
	}
	eventually(t, "all are members", func() bool { return len(watched.members()) == 8 })

	var scripts []*missing // each with other tools, and with one clock
	hold := filepath.Join(t.TempDir(), "hold")
	for shell, awk := range map[string]string{"sh": "awk", "dash": "mawk", "bash": "gawk", "busybox": "busybox"} {
		dir := t.TempDir()
		shellPath, err := exec.LookPath(shell)
		awkPath, noAwk := exec.LookPath(awk)
		if err != nil || noAwk != nil {
			t.Logf("SKIPPED: no %s with the awk of %s here", shell, awk)
			continue
		}
		shell = filepath.Join(dir, "sh")
		if err := errors.Join(os.Symlink(shellPath, shell), os.Symlink(awkPath, filepath.Join(dir, "awk"))); err != nil {
			t.Fatal(err)
		}
		writeScript(t, filepath.Join(dir, "sleep"), "while [ -e '"+hold+"' ]; do /bin/sleep 0.1; done; exec /bin/sleep $1")
		scripts = append(scripts, startMissing(t, shell, append(exampleEnv(t, dir), "SERF_RPC_ADDR="+rpc)))
	}
	told := func(names ...string) {
		t.Helper()
		for _, m := range scripts {
			for _, name := range names {
				if n := m.tells(t, name, peers[name].advertised); n != 1 {
					t.Errorf("%d messages of %s", n, name)
				}
			}
		}
	}
	peers["gone"].kill()
	told("gone")                                           // so they all listen
	if err := os.WriteFile(hold, nil, 0o644); err != nil { // until it is back, however busy this machine is
		t.Fatal(err)
	}
	for _, name := range []string{"returns", hostile, tick} {
		peers[name].kill()
	}
	watched.waitStatus("returns", "failed")
	back := startAgent(t, "-node=returns", "-join", hub.advertised)
	watched.waitStatus("returns", "alive")
	os.Remove(hold)
	peers["leaves"].int()
	told(hostile, tick)
	watched.kill()
	peers["late"].kill()
	watched = startAgent(t, "-node", "watched", "-rpc-addr", rpc, "-join", hub.advertised)
	told("gone", hostile, tick, "late")
	for _, m := range scripts {
		if n := strings.Count(m.String(), "\n"); n != 4 {
			t.Errorf("%d messages, want 4:\n%s", n, m)
		}
	}

	peers["returns"] = back
	back.kill()
	told("returns")
	for _, m := range scripts {
		syscall.Kill(m.pid, syscall.SIGTERM)
	}
	for i, m := range scripts {
		eventually(t, "nothing of missing.sh is left after the next event", func() bool {
			hub.run("tags", "-set", fmt.Sprint("n=", i, time.Now().UnixMilli()))
			return groupAlive(m.pid) == 0
		})
	}
}

func TestMissingScriptTellsOfFailuresInLinesThatWereDropped(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeScript(t, filepath.Join(dir, "hamlet"), `case $1 in
	watch) echo "2026/11/24 12:00:00 member: missing 10.0.0.1:7946 failed"
		echo "2026/11/24 12:00:00 member: web1 10.0.0.2:7946 alive"
		echo "2026/11/24 12:00:00 member: web2 10.0.0.3:7946 failed"
		sleep 1
		echo "(9 lines are missing here: this reader was too slow)"
		echo "2026/11/24 12:00:00 member-join: web3 10.0.0.4:7946 alive"
		exec sleep 60 ;;
	members) echo "missing  10.0.0.1:7946    failed    role=web"
		echo "web1     10.0.0.2:7946    failed"
		echo "web2     10.0.0.3:7946    alive" ;;
	esac`)
	m := startMissing(t, "sh", append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH")))
	m.tells(t, "web1", "10.0.0.2:7946")
	if said := m.String(); m.tells(t, "missing", "10.0.0.1:7946") != 1 || strings.Contains(said, "web2") {
		t.Errorf("it told:\n%s", said)
	}
	cmd := exec.Command("examples/watch/missing.sh", "30")
	if _, stderr, code := runCmd(t, cmd); code != 2 || !strings.Contains(stderr, "usage: ") {
		t.Errorf("without a command: exit %d, %q", code, stderr)
	}
}

// The same program three times: each shows the same lines.
func TestFollowersShowTheLivingAfterEachChange(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rpc := freePort(t)
	start := func() *agent { return startAgent(t, "-node", "a", "-rpc-addr", rpc) }
	a := start()
	goProgram := filepath.Join(dir, "follow")
	if out, err := exec.Command("go", "build", "-o", goProgram, "examples/watch/follow.go").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	shown := make(map[string]*output)
	for _, name := range []string{"examples/watch/follow.sh", "examples/watch/follow.py", goProgram} {
		if filepath.Ext(name) == ".py" {
			if _, err := exec.LookPath("python3"); err != nil {
				t.Log("SKIPPED: there is no python3 here")
				continue
			}
		}
		shown[name] = &output{}
		cmd := exec.Command(name)
		cmd.Env = append(exampleEnv(t, dir), "SERF_RPC_ADDR="+rpc)
		cmd.Stdout = shown[name]
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.WaitDelay = time.Second
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			cmd.Wait()
		})
	}
	// last waits until each program's last line shows these agents.
	last := func(agents ...*agent) {
		t.Helper()
		want := "alive:"
		for _, x := range agents {
			want += " " + x.name + "=" + x.advertised
		}
		for name, out := range shown {
			eventually(t, fmt.Sprintf("%s shows %q last", name, want), func() bool { return strings.HasSuffix("\n"+out.String(), "\n"+want+"\n") })
		}
	}
	last(a)
	b := startAgent(t, "-node", "b", "-join", a.advertised)
	last(a, b)
	c := startAgent(t, "-node", "c", "-join", a.advertised)
	last(a, b, c)
	a.run("event", "deploy") // changes nothing, and is not shown
	b.kill()
	last(a, c)
	c.int()
	last(a)
	for name, out := range shown {
		if lines := strings.Count(out.String(), "\n"); lines > 5 {
			t.Errorf("%s shows %d lines for 5 changes:\n%s", name, lines, out)
		}
	}
	a.kill() // they wait, and go on
	a = start()
	last(a)
}

// --- examples/systemd

// unitValue returns a key's value in the unit.
func unitValue(t *testing.T, key string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindStringSubmatch(readFile("examples/systemd/hamlet.service"))
	if m == nil {
		t.Fatalf("the unit has no %s", key)
	}
	return m[1]
}

func TestSystemdTakesTheUnit(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("SKIPPED: systemd-analyze is not installed")
	}
	installed, _, _ := strings.Cut(unitValue(t, "ExecStart"), " ")
	unit := filepath.Join(t.TempDir(), "hamlet.service")
	text := strings.ReplaceAll(readFile("examples/systemd/hamlet.service"), installed, program) // it looks whether it is there
	if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	// What it only ignores it prints, too.
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", unit).CombinedOutput(); err != nil || strings.Contains(string(out), "hamlet") {
		t.Errorf("%v: %s", err, out)
	}
	// Its own measure, 0 to 100: 84 with nothing but a user of its own.
	out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--threshold=20", unit).CombinedOutput()
	if strings.Contains(string(out), "unrecognized option") {
		t.Skip("SKIPPED: this systemd-analyze cannot tell how exposed a unit is that does not run")
	}
	if err != nil || !strings.Contains(string(out), "Overall exposure level") {
		t.Errorf("how exposed it is: %v: %s", err, out)
	}
}

func TestSystemdUnitsAgentJoinsAndLeavesWhenStopped(t *testing.T) {
	t.Parallel()
	seed := startAgent(t, "-node", "seed")
	command := strings.Fields(unitValue(t, "ExecStart"))
	if filepath.Base(command[0]) != "hamlet" {
		t.Fatalf("the unit starts %s", command[0])
	}
	cmd := hamletCmd(append(command[1:], agentArgs()[1:]...)...)
	// systemd's rules for the file: lines of NAME=value, # comments.
	for line := range strings.Lines(readFile("examples/systemd/hamlet.env")) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			cmd.Env = append(cmd.Env, line)
		}
	}
	cmd.Env = append(cmd.Env, "HAMLET_NODE=unit", "HAMLET_JOIN="+seed.advertised)
	unit := startAgentCmd(t, cmd)
	seed.waitStatus("unit", "alive")
	if seed.member("unit").Tags["role"] != "web" {
		t.Errorf("the role of hamlet.env is not there: %v", seed.members())
	}
	unit.signal(map[string]syscall.Signal{"SIGINT": syscall.SIGINT, "SIGTERM": syscall.SIGTERM}[unitValue(t, "KillSignal")])
	if code := unit.wait(); code != 0 {
		t.Errorf("exit status %d: systemd would start it again", code)
	}
	seed.waitStatus("unit", "left")
}

// --- examples/haproxy with everything real: make haproxy-test

// webClient sends requests over one connection after the other. It never tries
// again: what fails, counts.
type webClient struct {
	addr, path string
	keep       bool // the connection, as long as the server does
	conn       net.Conn
	r          *bufio.Reader
}

func (c *webClient) get() (from string, err error) {
	defer func() {
		if err != nil && c.conn != nil {
			c.conn.Close()
			c.conn = nil
		}
	}()
	if c.conn == nil {
		if c.conn, err = net.DialTimeout("tcp", c.addr, 5*time.Second); err != nil {
			return "", err
		}
		c.r = bufio.NewReader(c.conn)
	}
	c.conn.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(c.conn, "GET %s HTTP/1.1\r\nHost: www.example.com\r\n\r\n", c.path)
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err == nil && (resp.Close || !c.keep) {
		c.conn.Close()
		c.conn = nil
	}
	return string(body), err
}

// webAnswer is how a request went.
type webAnswer struct {
	began, ended time.Time
	from         string
	err          error
}

// webLoad is all clients and what they were answered.
type webLoad struct {
	mu      sync.Mutex
	answers []webAnswer
	first   map[string]time.Time // by server: its first answer since it was cleared
}

func (l *webLoad) client(c *webClient, pause time.Duration, stop <-chan struct{}) {
	for {
		a := webAnswer{began: time.Now()}
		a.from, a.err = c.get()
		a.ended = time.Now()
		l.mu.Lock()
		l.answers = append(l.answers, a)
		if a.err == nil && l.first[a.from].IsZero() {
			l.first[a.from] = a.ended
		}
		l.mu.Unlock()
		select {
		case <-stop:
			return
		case <-time.After(pause):
		}
	}
}

// forget makes the next answer of a server its first.
func (l *webLoad) forget(server string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.first, server)
}

// last is when the last request that a server answered began, and when it ended.
func (l *webLoad) last(server string) (began, ended time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.answers {
		if a.from == server && a.began.After(began) {
			began = a.began
		}
		if a.from == server && a.ended.After(ended) {
			ended = a.ended
		}
	}
	return began, ended
}

// webStats sums up the answers that ended since a moment.
type webStats struct {
	requests, failed int
	lasted           time.Duration // from the moment to the end of the last that failed
	slowest          time.Duration
	servers          map[string]int
	err              error
}

func (l *webLoad) since(start time.Time) webStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := webStats{servers: make(map[string]int)}
	for _, a := range l.answers {
		if a.ended.Before(start) {
			continue
		}
		s.requests++
		s.slowest = max(s.slowest, a.ended.Sub(a.began))
		if a.err != nil {
			s.failed++
			s.lasted, s.err = a.ended.Sub(start), a.err
			continue
		}
		s.servers[a.from]++
	}
	return s
}

func (s webStats) String() string {
	if s.failed == 0 {
		return fmt.Sprintf("0 of %d requests failed", s.requests)
	}
	return fmt.Sprintf("%d of %d requests failed, the last after %d ms (%v)", s.failed, s.requests, s.lasted.Milliseconds(), s.err)
}

// webFarm is a balancer, its web nodes and their clients.
type webFarm struct {
	t          *testing.T
	dir, addr  string
	seed       string // gossip address of the balancer's agent
	rpc        string
	load       *webLoad
	nodes      map[string]*webNode
	agent      *agent
	haproxyPID int
}

type webNode struct {
	ip, addr, rpc string
	cmd           *exec.Cmd
	output        *output
	ended         chan struct{}
}

func newWebFarm(t *testing.T) *webFarm {
	t.Helper()
	free := freeAddrs(t, "127.77.0.1", 3)
	f := &webFarm{t: t, dir: t.TempDir(), addr: free[0], seed: free[1], rpc: free[2], nodes: make(map[string]*webNode)}
	os.Chmod(f.dir, 0o755)
	config := ownHAProxyConfig(t, f.dir, f.addr)
	extra := filepath.Join(f.dir, "test.cfg")
	err := errors.Join(
		os.WriteFile(extra, []byte("global\n    stats socket "+filepath.Join(f.dir, "admin")+" mode 600 level admin\n"), 0o644),
		os.WriteFile(f.list(), []byte(readFile("examples/haproxy/web.cfg")), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("haproxy", "-W", "-p", filepath.Join(f.dir, "pid"), "-f", config, "-f", f.list(), "-f", extra)
	log := &output{}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.haproxyPID = cmd.Process.Pid
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // the master ends its workers
		cmd.Wait()
		if t.Failed() {
			t.Logf("HAProxy:\n%s", log)
		}
	})
	eventually(t, "HAProxy answers", func() bool { return f.worker() != "" })
	return f
}

func (f *webFarm) list() string { return filepath.Join(f.dir, "web.cfg") }

// ask sends a command to HAProxy's worker.
func (f *webFarm) ask(command string) string {
	conn, err := net.Dial("unix", filepath.Join(f.dir, "admin"))
	if err != nil {
		return ""
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	io.WriteString(conn, command+"\n")
	out, _ := io.ReadAll(conn)
	return string(out)
}

// worker is the process id of HAProxy's worker.
func (f *webFarm) worker() string {
	if m := regexp.MustCompile(`(?m)^Pid: (\d+)`).FindStringSubmatch(f.ask("show info")); m != nil {
		return m[1]
	}
	return ""
}

// startBalancerAgent starts the balancer's agent with the example's handler.
func (f *webFarm) startBalancerAgent() {
	f.t.Helper()
	handler, _ := filepath.Abs("examples/haproxy/balance.sh")
	args := []string{"agent", "-node", "lb", "-role", "lb", "-bind", f.seed, "-rpc-addr", f.rpc, "-log-level", "debug",
		"-event-handler", "member-join,member-leave,member-failed,member-update=" + handler}
	cmd := hamletCmd(args...)
	cmd.Env = append(exampleEnv(f.t, f.dir), "BALANCE_LIST="+f.list(), "BALANCE_PID="+filepath.Join(f.dir, "pid"))
	f.agent = startAgentCmd(f.t, cmd)
}

// start starts a web node with web.sh and returns how long it took until a
// client was answered by it.
func (f *webFarm) start(name string) time.Duration {
	f.t.Helper()
	n := f.nodes[name]
	if n == nil {
		n = &webNode{ip: fmt.Sprintf("127.77.1.%d", len(f.nodes)+1)}
		free := freeAddrs(f.t, n.ip, 2)
		n.addr, n.rpc = free[0], free[1]
		f.nodes[name] = n
	}
	self, _ := os.Executable()
	_, port, _ := net.SplitHostPort(n.addr)
	n.cmd = exec.Command("examples/haproxy/web.sh", port, self, "example-web-server", n.addr, name)
	n.cmd.Env = append(exampleEnv(f.t, f.dir), "HAMLET_NODE="+name, "HAMLET_BIND="+n.ip+":0", "HAMLET_RPC_ADDR="+n.rpc, "HAMLET_JOIN="+f.seed, "DRAIN=2")
	n.output = &output{}
	n.cmd.Stdout, n.cmd.Stderr = n.output, n.output
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	f.load.forget(name)
	began := time.Now()
	if err := n.cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	ended, output, pid := make(chan struct{}), n.output, n.cmd.Process.Pid
	n.ended = ended
	go func(cmd *exec.Cmd) { cmd.Wait(); close(ended) }(n.cmd)
	f.t.Cleanup(func() {
		if groupAlive(pid) > 0 {
			syscall.Kill(-pid, syscall.SIGKILL)
		}
		<-ended
		if f.t.Failed() {
			f.t.Logf("%s:\n%s", name, output)
		}
	})
	return f.served(name).Sub(began)
}

// served waits until a client is answered by a web node, and returns when the first one was.
func (f *webFarm) served(name string) (first time.Time) {
	f.t.Helper()
	eventually(f.t, name+" is served", func() bool {
		f.load.mu.Lock()
		defer f.load.mu.Unlock()
		first = f.load.first[name]
		return !first.IsZero()
	})
	return first
}

// ending ends a web node with a signal to its processes or its script, and
// returns when it was out of the list and when HAProxy's worker knew.
func (f *webFarm) ending(name string, s syscall.Signal, whole bool) (unlisted, unknown time.Duration) {
	f.t.Helper()
	pid := f.nodes[name].cmd.Process.Pid
	if whole {
		pid = -pid
	}
	began := time.Now()
	if err := syscall.Kill(pid, s); err != nil {
		f.t.Fatal(err)
	}
	return f.gone(name, began)
}

// tags runs the tags command on a web node.
func (f *webFarm) tags(name string, args ...string) {
	f.t.Helper()
	cmd := askCmd(f.nodes[name].rpc, "tags", args...)
	if _, stderr, code := runCmd(f.t, cmd); code != 0 {
		f.t.Fatalf("tags %v: %s", args, stderr)
	}
}

// gone waits until a web node is out of the list, and until HAProxy's worker knows.
func (f *webFarm) gone(name string, began time.Time) (unlisted, unknown time.Duration) {
	f.t.Helper()
	n := f.nodes[name]
	for _, step := range []struct {
		what  string
		found func() bool
		took  *time.Duration
	}{
		{"the list", func() bool { return strings.Contains(readFile(f.list()), n.addr) }, &unlisted},
		{"HAProxy", func() bool { s := f.ask("show servers state web"); return s == "" || strings.Contains(s, n.addr) }, &unknown},
	} {
		for ; step.found(); time.Sleep(time.Millisecond) {
			if time.Since(began) > 15*time.Second {
				f.t.Fatalf("%s is in %s still after 15 s:\n%s", name, step.what, f.agent.stderr)
			}
		}
		*step.took = time.Since(began)
	}
	return unlisted, unknown
}

// withoutRetries reloads HAProxy with another configuration: no second try at another server.
func (f *webFarm) withoutRetries() {
	f.t.Helper()
	path := filepath.Join(f.dir, "haproxy.cfg")
	text := regexp.MustCompile(`(?m)^ +(retries|option redispatch|retry-on) .*\n`).ReplaceAllString(readFile(path), "")
	text = strings.Replace(text, "defaults\n", "defaults\n    retries 0\n", 1)
	before := f.worker()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
	eventually(f.t, "HAProxy has reloaded", func() bool {
		syscall.Kill(f.haproxyPID, syscall.SIGUSR2) // which is lost while it loads
		time.Sleep(slowAnswer)
		now := f.worker()
		return now != "" && now != before
	})
}

func say(what, format string, args ...any) {
	fmt.Printf("%-44s %s\n", what, fmt.Sprintf(format, args...))
}

// drains takes a web node out by its tag and brings it back, some times over.
func (f *webFarm) drains(name, label string) {
	f.t.Helper()
	const rounds = 3
	all := time.Now()
	var unlisted, unknown, begun, answered, back time.Duration // the longest
	for range rounds {
		began := time.Now()
		f.tags(name, "-set", "state=drain")
		list, worker := f.gone(name, began)
		settle()
		quiet := time.Now() // its last requests are answered
		settle()
		lastBegun, lastAnswered := f.load.last(name)
		unlisted, unknown = max(unlisted, list), max(unknown, worker)
		begun, answered = max(begun, lastBegun.Sub(began)), max(answered, lastAnswered.Sub(began))
		if from, err := (&webClient{addr: f.nodes[name].addr, path: "/"}).get(); from != name {
			f.t.Errorf("%s drains and does not serve on: %q, %v", name, from, err)
		}
		if status := f.agent.status(name); status != "alive" {
			f.t.Errorf("%s drains and is %s", name, status)
		}
		if s := f.load.since(quiet); s.requests < 50 || s.servers[name] > 0 {
			f.t.Errorf("%d of %d requests went to %s while it was out", s.servers[name], s.requests, name)
		}

		f.load.forget(name)
		began = time.Now()
		f.tags(name, "-delete", "state")
		back = max(back, f.served(name).Sub(began))
		settle()
	}
	s := f.load.since(all)
	say(fmt.Sprintf("%s drains and returns, %d times%s:", name, rounds, label), "%v; slowest %d ms", s, s.slowest.Milliseconds())
	say("  state=drain:", "out of the list after %d ms, HAProxy reloaded after %d ms, "+
		"its last request came after %d ms and was answered after %d ms (the longest each)",
		unlisted.Milliseconds(), unknown.Milliseconds(), begun.Milliseconds(), answered.Milliseconds())
	say("  -delete state:", "served again after %d ms", back.Milliseconds())
	if s.failed > 0 {
		f.t.Errorf("draining%s: %v", label, s)
	}
	if begun > unknown+slowAnswer {
		f.t.Errorf("a request went to %s %v after it drained; HAProxy knew after %v", name, begun, unknown)
	}
}

// allDrain drains all web nodes, which serve on then, and brings them back.
func (f *webFarm) allDrain() {
	f.t.Helper()
	began := time.Now()
	for name := range f.nodes {
		f.tags(name, "-set", "state=drain")
	}
	f.agent.waitLog("all members with role=web are draining: they serve on")
	eventually(f.t, "all are listed again", func() bool { return strings.Count(readFile(f.list()), " server ") == len(f.nodes) })
	settle()
	for name := range f.nodes {
		f.tags(name, "-delete", "state")
	}
	settle()
	s := f.load.since(began)
	say("all drain, and return:", "%v", s)
	if s.failed > 0 {
		f.t.Errorf("when all drained: %v", s)
	}
	if n := strings.Count(readFile(f.list()), " server "); n != len(f.nodes) {
		f.t.Errorf("%d are listed after all had drained", n)
	}
}

// settle lets things go on a little, longer than the slow requests take.
func settle() { time.Sleep(2 * slowAnswer) }

func TestHAProxyFollowsTheCluster(t *testing.T) {
	if os.Getenv("HAPROXY_TEST") != "1" {
		t.Skip("run by make haproxy-test")
	}
	if _, err := exec.LookPath("haproxy"); err != nil {
		t.Fatal(err)
	}
	f := newWebFarm(t)
	f.load = &webLoad{first: make(map[string]time.Time)}
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for _, c := range []*webClient{
		{path: "/", keep: true}, {path: "/", keep: true}, {path: "/"}, {path: "/"}, {path: "/slow", keep: true}, {path: "/slow"}, {path: "/slow"},
	} {
		c.addr = f.addr
		clients.Go(func() { f.load.client(c, 4*time.Millisecond, stop) })
	}
	t.Cleanup(func() { close(stop); clients.Wait() })
	f.startBalancerAgent()
	none := func(what string, s webStats) {
		t.Helper()
		if s.failed > 0 {
			t.Errorf("%s: %v", what, s)
		}
	}

	served := f.start("web1")
	say("web1 joins:", "served %d ms after its start", served.Milliseconds())
	began := time.Now()
	for _, name := range []string{"web2", "web3"} {
		say(name+" joins:", "served %d ms after its start", f.start(name).Milliseconds())
	}
	settle()
	s := f.load.since(began)
	say("  while they joined:", "%v", s)
	none("joining", s)

	began = time.Now()
	unlisted, unknown := f.ending("web1", syscall.SIGKILL, true)
	settle()
	s = f.load.since(began)
	say("web1 killed (SIGKILL, agent and server):", "%v; slowest %d ms", s, s.slowest.Milliseconds())
	say("  taken out:", "of the list after %d ms, HAProxy reloaded after %d ms", unlisted.Milliseconds(), unknown.Milliseconds())
	if s.failed > 3 {
		t.Errorf("the death of one of three: %v", s)
	}
	if list := readFile(f.list()); strings.Count(list, " server ") != 2 {
		t.Errorf("the list after the death of one of three:\n%s", list)
	}

	began = time.Now()
	served = f.start("web1")
	settle()
	s = f.load.since(began)
	say("web1 returns:", "served %d ms after its start; %v", served.Milliseconds(), s)
	none("returning", s)

	began = time.Now()
	web2 := f.nodes["web2"]
	unlisted, unknown = f.ending("web2", syscall.SIGTERM, false)
	direct := &webClient{addr: web2.addr, path: "/"}
	if from, err := direct.get(); from != "web2" {
		t.Errorf("web2 left and did not serve on: %q, %v", from, err)
	}
	quiet := time.Now().Add(time.Second) // for connections that the old worker had open
	<-web2.ended
	settle()
	s = f.load.since(began)
	say("web2 leaves (SIGTERM to web.sh):", "%v", s)
	say("  drained:", "out of the list after %d ms, HAProxy reloaded after %d ms, server stopped after %d ms",
		unlisted.Milliseconds(), unknown.Milliseconds(), time.Since(began).Milliseconds())
	none("leaving", s)
	if late := f.load.since(quiet).servers["web2"]; late > 0 {
		t.Errorf("%d requests went to web2 after HAProxy had let go of it", late)
	}
	if code := web2.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("web.sh ended with %d", code)
	}
	if f.agent.status("web2") != "left" {
		t.Errorf("web2 is %s", f.agent.status("web2"))
	}
	f.start("web2")

	f.drains("web3", "")
	f.allDrain()

	began = time.Now()
	f.agent.kill()
	f.startBalancerAgent()
	f.agent.waitStatus("web3", "alive")
	settle()
	s = f.load.since(began)
	say("the balancer's agent killed, started again:", "%v", s)
	none("the agent's restart", s)
	if list := readFile(f.list()); strings.Count(list, " server ") != 3 {
		t.Errorf("the list after the agent's restart:\n%s", list)
	}

	fmt.Println("With HAProxy's retries switched off, to see what the handler does:")
	f.withoutRetries()
	f.drains("web2", ", no retries")
	began = time.Now()
	_, unknown = f.ending("web3", syscall.SIGKILL, true)
	settle()
	s = f.load.since(began)
	say("  web3 killed:", "%v; HAProxy reloaded after %d ms", s, unknown.Milliseconds())
	if s.lasted > unknown+time.Second {
		t.Errorf("without retries: %v, though HAProxy knew after %v", s, unknown)
	}
	f.start("web3")
	f.agent.kill()
	began = time.Now()
	syscall.Kill(-f.nodes["web1"].cmd.Process.Pid, syscall.SIGKILL)
	time.Sleep(5 * time.Second)
	say("  web1 killed, with no agent on the balancer:", "%v (HAProxy's own check)", f.load.since(began))
}
